"""The ppo stage, in a process of its own, with an engine that dies or hangs in the middle of the run.

The stage ends with the reason, leaves what it had, and the next run goes on from there to the very weights of a run
whose engine never failed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.artifacts import Artifact
from align.errors import StageFailed
from align.pipeline import Pipeline
from align.planning import plan
from align.ppo.stage_run import _saying_what_is_kept
from align.rollouts.server_client import EngineLost
from align.runner import Listener, run_pipeline
from align.runtime import Runtime
from align.stage import StageContext
from align.stages.ppo import run as run_ppo
from align.store import Store
from tests.rollouts.model_server import ModelServer

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


@pytest.fixture
def server(tiny_model: Path) -> Iterator[ModelServer]:
    """A server that was running already, healthy until a test says otherwise."""
    one = ModelServer(tiny_model)
    yield one
    one.stop()


@pytest.fixture
def raw(tiny_model: Path) -> dict[str, Any]:
    """A pipeline of a given policy, given prompts, and three updates of PPO."""
    ppo = {
        "stage": "ppo",
        "policy": "policy",
        "prompts": "prompts",
        "score": "tests.stages.vowels:share",
        "learning_rate": 1e-3,
        "updates": UPDATES,
        "rollout_batch": 8,
        "max_tokens": 6,
        "max_prompt_tokens": 64,
        "precision": "float32",
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
    }
    given = "tests.stages.given"
    return {
        "name": "served",
        "seed": 3,
        "runtime": {"threads": 1, "engine": {"name": "vllm-server", "batch_size": 4, "timeout": 60}},
        "stages": {
            "policy": {"stage": f"{given}:POLICY", "folder": str(tiny_model)},
            "prompts": {"stage": f"{given}:PROMPTS", "count": 8},
            "ppo": ppo,
        },
    }


class Resumed(Listener):
    """Notes which stages went on from an earlier attempt."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage_started(self, node: Any, folder: Path, resumed: bool) -> None:
        self.stages += [node.name] if resumed else []


def run(raw: dict[str, Any], store: Path, listener: Listener | None = None, **engine: Any) -> Artifact:
    """The artifact of the ppo stage, run with another engine configuration than ``raw`` has."""
    runtime = raw["runtime"] | {"engine": raw["runtime"]["engine"] | engine}
    pipeline = Pipeline(raw | {"runtime": runtime})
    return run_pipeline(pipeline, store=store, listener=listener).artifacts["ppo"]


def fail(raw: dict[str, Any], store: Path, **engine: Any) -> str:
    """What is said of a run that fails; it exits with 1 and leaves a partial that the next one resumes."""
    with pytest.raises(StageFailed) as caught:
        run(raw, store, **engine)
    assert caught.value.exit_code == 1
    (partial,) = store.glob("ppo/*.partial")
    assert json.loads((partial / "result.json").read_text())["status"] == "failed"
    assert {step.node.name: step.action for step in plan(Pipeline(raw), Store.open(store))}["ppo"] == "resume"
    return str(caught.value)


def finish(raw: dict[str, Any], store: Path, **engine: Any) -> Artifact:
    """Run again: it goes on after the second update and repeats none."""
    resumed = Resumed()
    artifact = run(raw, store, resumed, **engine)
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
    found: Artifact, raw: dict[str, Any], store: Path, wholes: dict[str, Whole], **engine: Any
) -> None:
    """The same stage on the same inputs with a healthy engine in one go comes to the same weights, bit for bit."""
    name = str((raw["runtime"]["engine"] | engine)["name"])
    if name not in wholes:
        wholes[name] = run_whole(raw, store, **engine)
    metrics, weights = wholes[name]
    for each in ("score_first", "score_last", "kl_last", "length_last", "episodes", "tokens"):
        assert found.record["metrics"][each] == metrics[each], each
    others = load_file(found.path / "model" / "model.safetensors")
    assert all(torch.equal(others[each], weights[each]) for each in weights)


def run_whole(raw: dict[str, Any], store: Path, **engine: Any) -> Whole:
    """The stage run here, in this process."""
    node, opened, folder = Pipeline(raw).nodes["ppo"], Store.open(store), store.parent / "whole"
    made = {one.stage: one for one in opened.all()}
    inputs = {field: made[name] if isinstance(name, str) else None for field, name in node.inputs.items()}
    runtime = Runtime(threads=1, engine=raw["runtime"]["engine"] | engine)
    for name in ("output", "checkpoints"):
        (folder / name).mkdir(parents=True)
    places = folder / "output", folder / "checkpoints", folder / "events.jsonl"
    metrics = run_ppo(StageContext("ppo", node.config, inputs, node.seed, runtime, *places))
    return metrics, load_file(folder / "output" / "model" / "model.safetensors")


def test_a_server_lost_before_the_first_checkpoint(tmp_path: Path) -> None:
    said = "(?s)gone.*run again to start anew, since no checkpoint"
    with pytest.raises(EngineLost, match=said), _saying_what_is_kept(SimpleNamespace(checkpoints=tmp_path)):
        raise EngineLost("the server is gone")


def test_a_server_that_hangs(
    raw: dict[str, Any], server: ModelServer, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    """One that somebody else started, and that answers again when the stage is run again."""
    server.fault_at = FAULTY_LOAD
    said = fail(raw, tmp_path / "store", address=server.address, timeout=5)
    waited = f"EngineLost: the vLLM server at {server.address} did not answer /v1/completions within 5 s"
    assert f"{waited} (runtime.engine.timeout)" in said
    assert "/health answers" in said
    assert "With a server that answers, run again to go on from checkpoint-2." in said
    found = finish(raw, tmp_path / "store", address=server.address)
    assert_as_without_failure(found, raw, tmp_path / "store", wholes, address=server.address)


def test_a_server_of_the_stage_s_own_that_dies(
    raw: dict[str, Any],
    server: ModelServer,
    wholes: dict[str, Whole],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stage starts the stand-in where it looks for vLLM's server; the next run starts a new one."""
    package = tmp_path / "shadow" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text("import sys; from tests.rollouts.model_server import main; main(sys.argv)")
    path = [str(tmp_path / "shadow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("FAKE_DIES_AT", str(FAULTY_LOAD - 1))  # it starts with the weights that another is given
    said = fail(raw, tmp_path / "store")
    assert re.search(
        r"EngineLost: the vLLM server at http://127\.0\.0\.1:\d+ could not be asked for /v1/completions", said
    )
    assert "Its process was ended by SIGKILL" in said
    assert "With a server that answers, run again to go on from checkpoint-2." in said
    monkeypatch.delenv("FAKE_DIES_AT")
    found = finish(raw, tmp_path / "store")
    assert_as_without_failure(found, raw, tmp_path / "store", wholes, address=server.address)


def test_an_engine_in_the_process_that_hangs(
    raw: dict[str, Any], wholes: dict[str, Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_HANGS", "1")
    said = fail(raw, tmp_path / "store", name="transformers", timeout=3)
    assert "the transformers engine made no progress in 'generate' for 3 s (runtime.engine.timeout)" in said
    (log,) = tmp_path.glob("store/ppo/*.partial/log.txt")
    assert "in never" in log.read_text()
    monkeypatch.delenv("ENGINE_HANGS")
    found = finish(raw, tmp_path / "store", name="transformers")
    assert_as_without_failure(found, raw, tmp_path / "store", wholes, name="transformers")
