"""Every stage that samples does so from a pool of servers: two stand-ins give what the engine in the process gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.runtime import Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.sample import SampleConfig
from align.data.rows import read_rows, user, write_rows
from align.evaluation import systems
from align.extensions.synthesis import local_model
from align.extensions.synthesis.config import SynthesizeConfig
from align.extensions.synthesis.run import synthesize
from align.inference import engine
from align.models.built_in import make_tiny
from align.pipeline.context import StageContext
from align.stages import evaluate, sample
from align.store.artifacts import Artifact, Kind
from tests.support.inference.fake_server import info
from tests.support.inference.model_server import ModelServer

ALONE = {"device": "cpu", "threads": 1, "engine": {"name": "transformers", "batch_size": 1}}
"""The same arithmetic as the stand-ins': one response at a time, in float32."""


def distinct(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """Distinct characters, a tenth each: noise of a random model that seldom ties."""
    return [len(set(response)) / 10 for response in responses]


@pytest.fixture(scope="module")
def servers(tiny_model: Path) -> Iterator[list[ModelServer]]:
    two = [ModelServer(tiny_model), ModelServer(tiny_model)]
    for server in two:
        server.answers["/server_info"] = lambda body: info(max_model_len=4096)
    yield two
    for server in two:
        server.stop()


def artifact(folder: Path, stage: str, kind: Kind, model: Path | None = None) -> Artifact:
    (folder / stage).mkdir(exist_ok=True)
    if model is not None:
        (folder / stage / "model").symlink_to(model)
    return Artifact(stage, kind, folder / stage, {"key": f"{stage}-key"})


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path) -> dict[str, Artifact]:
    """Two policies of one architecture, and prompts."""
    artifacts = {
        "sft": artifact(tmp_path, "sft", Kind.POLICY, tiny_model),
        "other": artifact(tmp_path, "other", Kind.POLICY, make_tiny(tmp_path / "made" / "model", seed=1)),
        "prompts": artifact(tmp_path, "prompts", Kind.PROMPTS),
    }
    rows = [{"id": str(i), "source": "t", "prompt": [user(f"say {i}")], "checks": ""} for i in range(6)]
    for split in ("train", "test"):
        write_rows(artifacts["prompts"].split(split), rows)
    return artifacts


def both_ways(
    run: Callable[[StageContext], Any], config: Any, inputs: dict[str, Any], servers: list[ModelServer], folder: Path
) -> list[StageContext]:
    """The stage run with the engine in this process, and with the pool, in which both servers must have answered."""
    done = []
    pool = {"device": "cpu", "threads": 1, "rollouts": {"addresses": [server.address for server in servers]}}
    for name, runtime in (("alone", ALONE), ("pool", pool)):
        for part in ("output", "checkpoints"):
            (folder / name / part).mkdir(parents=True)
        places = folder / name / "output", folder / name / "checkpoints", folder / name / "events.jsonl"
        for server in servers:
            server.calls.clear()
        context = StageContext("s", config, inputs, 11, Runtime.model_validate(runtime), *places)
        run(context)
        done.append(context)
    assert all("/v1/completions" in server.paths() for server in servers)
    return done


def test_sample(servers: list[ModelServer], inputs: dict[str, Artifact], tmp_path: Path) -> None:
    config = SampleConfig(
        policy="sft",
        prompts="prompts",
        n=3,
        max_tokens=8,
        score="tests.stages.test_servers:distinct",
        precision="float32",
    )
    stage_inputs = {"policy": inputs["sft"], "prompts": inputs["prompts"], "reward": None}
    alone, pool = both_ways(sample.run, config, stage_inputs, servers, tmp_path)
    for file in ("samples.jsonl", "train.parquet", "test.parquet"):
        assert (alone.output / file).read_bytes() == (pool.output / file).read_bytes(), file


def test_evaluate(servers: list[ModelServer], inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Two policies: servers are given the second one's weights when it is its turn."""
    config = EvaluateConfig(
        policies=["sft", "other"], reference="sft", prompts="prompts", score="tests.stages.test_servers:distinct",
        max_tokens=8, precision="float32", max_prompt_tokens=100, bootstrap=200,
    )  # fmt: skip
    empty = dict.fromkeys(EvaluateConfig.model_fields)
    stage_inputs = empty | {
        "policies": [inputs["sft"], inputs["other"]],
        "reference": inputs["sft"],
        "prompts": inputs["prompts"],
    }
    alone, pool = both_ways(evaluate.run, config, stage_inputs, servers, tmp_path)
    cards = [json.loads((folder.output / "scorecard.json").read_text()) for folder in (alone, pool)]
    assert cards[0]["estimates"] == cards[1]["estimates"]
    assert [card["settings"]["engines"] for card in cards] == [["transformers"], ["vllm-server"]]
    assert cards[0]["estimates"]["sft"] != cards[0]["estimates"]["other"]


def test_synthesis(servers: list[ModelServer], inputs: dict[str, Artifact], tmp_path: Path) -> None:
    task = {"type": "responses", "n": 2, "cut_off": "keep"}
    settings = {"model": "sft", "prompts": "prompts", "task": task, "precision": "float32", "max_tokens": 8}
    stage_inputs = dict.fromkeys(SynthesizeConfig.model_fields) | {"model": inputs["sft"], "prompts": inputs["prompts"]}
    config = SynthesizeConfig.model_validate(settings)
    alone, pool = both_ways(synthesize, config, stage_inputs, servers, tmp_path)
    for split in ("train", "test"):
        rows = [read_rows(folder.output / f"{split}.parquet") for folder in (alone, pool)]
        assert rows[0] == rows[1] and rows[0]


class Opened:
    """What stands for an engine where only its opening is looked at."""

    name = "opened"

    def load_weights(self, weights: Any) -> None:
        self.loaded = [name for name, _ in weights]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("rollouts", "then"), [({"servers": 2}, "servers"), ({"addresses": ["http://127.0.0.1:1"]}, "transformers")]
)
def test_a_judge_of_another_architecture(
    rollouts: dict[str, Any], then: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own servers are started anew for it; those at addresses keep their model, so transformers answers instead."""
    runtimes: list[Runtime] = []

    def open_engine(model_dir: Path, runtime: Runtime, **others: Any) -> Opened:
        runtimes.append(runtime)
        return Opened()

    monkeypatch.setattr(local_model, "open_engine", open_engine)
    monkeypatch.setattr(engine, "architecture", lambda folder: folder.name)
    (tmp_path / "judge").symlink_to(tiny_model)
    runtime = Runtime.model_validate({"rollouts": rollouts})
    config = SimpleNamespace(precision="float32")
    context = StageContext("s", config, {}, 0, runtime, tmp_path, tmp_path, tmp_path / "events.jsonl")
    engines = local_model.Engines(context, 64)
    first = engines.with_weights(tiny_model)
    assert engines.with_weights(tiny_model) is first and len(runtimes) == 1
    engines.with_weights(tmp_path / "judge")
    assert len(runtimes) == 2 and first.closed  # type: ignore[attr-defined]
    assert ("servers" if runtimes[1].rollouts.servers else runtimes[1].engine.name) == then
    assert not runtimes[1].rollouts.addresses


@pytest.mark.parametrize(
    ("rollouts", "then"), [({"servers": 2}, "servers"), ({"addresses": ["http://127.0.0.1:1"]}, "transformers")]
)
def test_policies_of_several_architectures(
    rollouts: dict[str, Any], then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "architecture", lambda folder: folder.name)
    policies: Any = [SimpleNamespace(model_dir=Path(name)) for name in ("one", "two")]
    messages: list[str] = []
    sampler = systems.Sampler(
        policies,
        Runtime.model_validate({"rollouts": rollouts}),
        lambda folder, runtime: None,  # type: ignore[arg-type, return-value]
        systems.ResponseCache(tmp_path, print),
        warn=messages.append,
        progress=lambda done, total: None,
    )
    assert ("servers" if sampler.runtime.rollouts.servers else sampler.runtime.engine.name) == then
    assert len(messages) == (then == "transformers")
