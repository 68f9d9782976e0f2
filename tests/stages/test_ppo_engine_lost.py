"""The ppo stage with an engine that dies or hangs in the middle of the run.

Servers are started anew, or asked again, and the run goes on. Where there is no engine any more the stage ends with the
reason, leaves what it had, and the next run goes on from there. Either way it comes to the very weights of a run whose
engine never failed.

The stage that fails runs in a process of its own, as users have it. What goes on from it may run in the test's process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align import Pipeline
from align.config.runtime import Runtime
from align.errors import StageFailed
from align.inference.servers.server_client import EngineLost
from align.pipeline.context import StageContext
from align.runner import run_stage
from align.runner.listener import Listener
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.stages.rl import _explain_lost_engine
from align.stages.rl import run as run_ppo
from align.store.artifacts import Artifact
from align.store.store import Store
from tests.support import in_process
from tests.support.inference.model_server import ModelServer

UPDATES = 3
FAULTY_LOAD = 4
"""The weights of the third update, behind those that the engine gives a server to begin with."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the stage's own process; what is compared bit for bit needs as many."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


Processes = Callable[[bool], None]


@pytest.fixture(autouse=True)
def stage_process(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """Run only the ppo stage in a process of its own; after ``stage_process(False)`` none."""
    start = run_stage.run_attempt

    def run_attempt(name: str, *rest: Any, **options: Any) -> dict[str, Any]:
        run = start if name == "ppo" else in_process.run_attempt
        return run(name, *rest, **options)

    def choose(separate: bool) -> None:
        monkeypatch.setattr(run_stage, "run_attempt", run_attempt if separate else in_process.run_attempt)

    choose(True)
    return choose


@pytest.fixture
def server(tiny_model: Path) -> Iterator[ModelServer]:
    """A server that was running already, healthy until a test says otherwise."""
    model_server = ModelServer(tiny_model)
    yield model_server
    model_server.stop()


@pytest.fixture
def raw(tiny_model: Path) -> dict[str, Any]:
    """A pipeline of a given policy, given prompts, and three updates of PPO."""
    ppo = {
        "stage": "ppo",
        "policy": "policy",
        "prompts": "prompts",
        "score": "tests.support.stages.vowels:share",
        "score_validation": {"rows": 0},
        "learning_rate": 1e-3,
        "updates": UPDATES,
        "rollout_batch": 8,
        "max_tokens": 6,
        "max_prompt_tokens": 64,
        "precision": "float32",
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
    }
    inputs = "tests.support.stages.fixed_inputs"
    return {
        "name": "served",
        "seed": 3,
        "runtime": {"threads": 1, "engine": {"batch_size": 4, "timeout": 60}},
        "stages": {
            "policy": {"stage": f"{inputs}:POLICY", "folder": str(tiny_model)},
            "prompts": {"stage": f"{inputs}:PROMPTS", "count": 8},
            "ppo": ppo,
        },
    }


class Resumed(Listener):
    """Notes which stages went on from an earlier attempt."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage_started(self, node: Any, folder: Path, resumed: bool) -> None:
        self.stages += [node.name] if resumed else []


def runtime_of(raw: dict[str, Any], rollouts: dict[str, Any] | None, engine: dict[str, Any]) -> dict[str, Any]:
    """The runtime of ``raw`` with these servers and other settings of the engine."""
    return raw["runtime"] | {"engine": raw["runtime"]["engine"] | engine, "rollouts": rollouts or {}}


def run(
    raw: dict[str, Any],
    store: Path,
    rollouts: dict[str, Any] | None = None,
    listener: Listener | None = None,
    **engine: Any,
) -> Artifact:
    """The artifact of the ppo stage, run with these servers and with other settings of the engine than ``raw`` has."""
    pipeline = Pipeline(raw | {"runtime": runtime_of(raw, rollouts, engine)})
    return run_pipeline(pipeline, store=store, listener=listener).artifacts["ppo"]


def fail(raw: dict[str, Any], store: Path, rollouts: dict[str, Any] | None = None, **engine: Any) -> str:
    """Return the message of a run that fails; it exits with 1 and leaves a partial that the next one resumes."""
    with pytest.raises(StageFailed) as caught:
        run(raw, store, rollouts, **engine)
    assert caught.value.exit_code == 1
    (partial,) = store.glob("ppo/*.partial")
    assert json.loads((partial / "result.json").read_text())["status"] == "failed"
    assert {step.node.name: step.action for step in plan(Pipeline(raw), Store.open(store))}["ppo"] == "resume"
    return str(caught.value)


def finish(raw: dict[str, Any], store: Path, rollouts: dict[str, Any] | None = None, **engine: Any) -> Artifact:
    """Run again: it goes on after the second update and repeats none."""
    resumed = Resumed()
    artifact = run(raw, store, rollouts, resumed, **engine)
    assert resumed.stages == ["ppo"]
    lines = [json.loads(line) for line in (artifact.path / "events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "metrics"] == list(range(1, UPDATES + 1))
    assert "checkpoint-2\n" in (artifact.path / "log.txt").read_text()
    return artifact


Whole = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Whole]:
    """Metrics and weights of runs whose engine never failed, by the engine: made once, by who needs one first."""
    return {}


def assert_as_without_failure(
    actual: Artifact,
    raw: dict[str, Any],
    store: Path,
    wholes: dict[str, Whole],
    rollouts: dict[str, Any] | None = None,
    **engine: Any,
) -> None:
    """The same stage on the same inputs with a healthy engine in one go comes to the same weights, bit for bit."""
    name = "servers" if rollouts else str(engine["name"])
    if name not in wholes:
        wholes[name] = run_whole(raw, store, rollouts, engine)
    metrics, weights = wholes[name]
    for each in ("score_first", "score_last", "kl_last", "length_last", "episodes", "tokens"):
        assert actual.record["metrics"][each] == metrics[each], each
    others = load_file(actual.path / "model" / "model.safetensors")
    assert all(torch.equal(others[each], weights[each]) for each in weights)


def run_whole(raw: dict[str, Any], store: Path, rollouts: dict[str, Any] | None, engine: dict[str, Any]) -> Whole:
    """The stage run here, in this process."""
    node, opened, folder = Pipeline(raw).nodes["ppo"], Store.open(store), store.parent / "whole"
    artifacts = {artifact.stage: artifact for artifact in opened.all()}
    inputs = {field: artifacts[name] if isinstance(name, str) else None for field, name in node.inputs.items()}
    runtime = Runtime.model_validate(runtime_of(raw, rollouts, engine))
    for name in ("output", "checkpoints"):
        (folder / name).mkdir(parents=True)
    places = folder / "output", folder / "checkpoints", folder / "events.jsonl"
    metrics = run_ppo(StageContext("ppo", node.config, inputs, node.seed, runtime, *places))
    return metrics, load_file(folder / "output" / "model" / "model.safetensors")


def test_a_server_lost_before_the_first_checkpoint(tmp_path: Path) -> None:
    message = "(?s)gone.*run again to start over, since no checkpoint"
    with pytest.raises(EngineLost, match=message), _explain_lost_engine(SimpleNamespace(checkpoints=tmp_path)):
        raise EngineLost("the server is gone")


def test_a_server_that_hangs(
    raw: dict[str, Any], server: ModelServer, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    """One that somebody else started, and that answers again when the stage is run again."""
    server.fault_at = FAULTY_LOAD
    model_server = {"addresses": [server.address]}
    error = fail(raw, tmp_path / "store", model_server | {"restarts": 0}, timeout=5)
    waited = f"EngineLost: the vLLM server at {server.address} did not answer /v1/completions within 5 s"
    assert f"{waited} (runtime.engine.timeout)" in error
    assert "/health answers" in error
    assert "Once the server answers, run again to resume from checkpoint-2." in error
    actual = finish(raw, tmp_path / "store", model_server)
    assert_as_without_failure(actual, raw, tmp_path / "store", wholes, model_server)


@pytest.fixture
def stand_in(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage starts the stand-in where it looks for vLLM's server; ``server`` has its model."""
    package = tmp_path / "shadow" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        "import sys; from tests.support.inference.stand_in import main; main(sys.argv)"
    )
    monkeypatch.setenv("ALIGN_TEST_MODEL", f"{server.address} {os.environ['ALIGN_SERVER_KEY']}")
    path = [str(tmp_path / "shadow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.mark.usefixtures("stand_in")
def test_the_last_server_of_the_stage_s_own_that_dies(
    raw: dict[str, Any],
    server: ModelServer,
    wholes: dict[str, Whole],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage_process: Processes,
) -> None:
    """The next run starts a new one."""
    monkeypatch.setenv("ALIGN_TEST_DIES_AT", str(FAULTY_LOAD - 1))  # it starts with the weights that another is given
    error = fail(raw, tmp_path / "store", {"servers": 1, "restarts": 0})
    assert re.search(r"EngineLost: the vLLM server at unix:/\S+ could not be asked for /v1/completions", error)
    assert "Its process was ended by SIGKILL" in error
    assert "Once the server answers, run again to resume from checkpoint-2." in error
    monkeypatch.delenv("ALIGN_TEST_DIES_AT")
    stage_process(False)
    actual = finish(raw, tmp_path / "store", {"servers": 1})
    assert_as_without_failure(actual, raw, tmp_path / "store", wholes, {"addresses": [server.address]})


@pytest.mark.usefixtures("stand_in")
def test_servers_that_die_are_started_anew(
    raw: dict[str, Any],
    server: ModelServer,
    wholes: dict[str, Whole],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are killed by the weights of the third update, after two answers; new ones are given those weights first."""
    monkeypatch.setenv("ALIGN_TEST_DIES_AT", str(FAULTY_LOAD - 1))
    result = run(raw, tmp_path / "store", {"servers": 2})
    events = [json.loads(line) for line in (result.path / "events.jsonl").read_text().splitlines()]
    # Alarms about the untrained model's responses are warnings as well.
    warned = [event["message"] for event in events if event["event"] == "warning" and "Server" in event["message"]]
    assert {text.splitlines()[-1] for text in warned} == {
        f"Server {number} of 2 is lost, for the first time: it is restarted." for number in (1, 2)
    }
    assert all("Its process was ended by SIGKILL" in text for text in warned)
    assert_as_without_failure(result, raw, tmp_path / "store", wholes, {"addresses": [server.address]})


@pytest.mark.slow  # tests/inference/test_watchdog.py has every call that hangs
def test_an_engine_in_the_process_that_hangs(
    raw: dict[str, Any], wholes: dict[str, Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_TEST_HANGS", "1")
    error = fail(raw, tmp_path / "store", name="transformers", timeout=3)
    assert "the transformers engine made no progress in 'generate' for 3 s (runtime.engine.timeout)" in error
    (log,) = tmp_path.glob("store/ppo/*.partial/log.txt")
    assert "in never" in log.read_text()
    monkeypatch.delenv("ALIGN_TEST_HANGS")
    actual = finish(raw, tmp_path / "store", name="transformers")
    assert_as_without_failure(actual, raw, tmp_path / "store", wholes, name="transformers")
