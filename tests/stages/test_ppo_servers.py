"""The ppo stage in several processes, of which the first one keeps the servers and asks them for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align import Pipeline
from align.runner.runner import run_pipeline
from align.store.artifacts import Artifact
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.inference.model_server import ModelServer

pytestmark = pytest.mark.slow

MEASURES = ("score", "kl", "loss", "entropy", "staleness")


@pytest.fixture(scope="module")
def servers(tiny_model: Path) -> Iterator[list[ModelServer]]:
    two = [ModelServer(tiny_model), ModelServer(tiny_model)]
    yield two
    for entry in two:
        entry.stop()


def run(
    tiny_model: Path, folder: Path, servers: list[ModelServer], processes: int, strategy: str, **fields: Any
) -> Artifact:
    ppo = {
        "stage": "ppo", "policy": "policy", "prompts": "prompts", "score": "tests.support.stages.vowels:share",
        "updates": 4,
        "learning_rate": 1e-3, "rollout_batch": 8, "max_tokens": 6, "max_prompt_tokens": 64, "precision": "float32",
        "micro_batch_size": 4, "max_staleness": 1, "eval_updates": 2, "eval_prompts": 3,
        **fields,
    }  # fmt: skip
    raw: dict[str, Any] = {
        "name": "shared",
        "seed": 3,
        "runtime": {
            "threads": 1,
            "device": "cpu",
            "engine": {"batch_size": 4, "timeout": 200},
            "rollouts": {"addresses": [server.address for server in servers]},
            "stages": {"ppo": {"launch": {"processes": processes, "strategy": strategy}}},
        },
        "stages": {
            "policy": {"stage": "tests.support.stages.fixed_inputs:POLICY", "folder": str(tiny_model)},
            "prompts": {"stage": "tests.support.stages.fixed_inputs:PROMPTS", "count": 8},
            "ppo": ppo,
        },
    }
    return run_pipeline(Pipeline(raw), store=folder).artifacts["ppo"]


def points(artifact: Artifact) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (artifact.path / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "metrics"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_and_two_servers(
    strategy: str, tiny_model: Path, servers: list[ModelServer], tmp_path: Path
) -> None:
    """What one process comes to, with rollouts drawn ahead, validations and probes."""
    result = run(tiny_model, tmp_path / "one", servers, 1, "ddp")
    for server in servers:
        server.calls.clear()
    two = run(tiny_model, tmp_path / "two", servers, 2, strategy)
    assert all("/v1/completions" in server.paths() for server in servers)
    assert result.record["key"] == two.record["key"]
    for first, second in zip(points(result), points(two), strict=True):
        for name in MEASURES:
            assert second.get(name) == pytest.approx(first.get(name), abs=1e-4), name
    weights, others = (load_file(actual.path / "model" / "model.safetensors") for actual in (result, two))
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4


def test_two_processes_go_on_with_new_weights(tiny_model: Path, tmp_path: Path) -> None:
    """The first process alone gives the servers weights between turns; both learn from what it gets."""
    presser = make_presser(tiny_model, tmp_path / "presser")
    servers = [ModelServer(presser), ModelServer(presser)]
    environment = {
        "class": "tests.support.environments.buttons:Buttons", "tool_format": FORMAT, "max_turns": 3, "max_tokens": 40,
        "turn_max_tokens": 8,
    }  # fmt: skip
    try:
        actual = run(
            presser, tmp_path / "store", servers, 2, "ddp",
            environment=environment, in_flight="continue", max_tokens=40, eval_updates=None, score=None,
        )  # fmt: skip
    finally:
        for server in servers:
            server.stop()
    logged = points(actual)
    assert [0 <= point["staleness"] <= point["staleness_max"] <= 1 for point in logged] == [True] * 4
    assert all(server.loads for server in servers)
