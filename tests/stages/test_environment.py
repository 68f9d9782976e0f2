"""The stages that learn from rollouts with an ``environment:``, on a tiny model that presses buttons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.pipeline.pipeline import Pipeline
from align.pipeline.registry import STAGES
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.refusals import Refused
from tests.support.rl.stages import COMMON, make_stage
from tests.support.stages.vowels import share
from tests.support.stored_rollouts import stored_rows

ENVIRONMENT: dict[str, Any] = {
    "class": "tests.support.environments.buttons:Buttons",
    "tool_format": FORMAT,
    "max_turns": 3,
    "max_tokens": 60,
    "turn_max_tokens": 8,
}


def fields(**changes: Any) -> dict[str, Any]:
    """Return the fields that a stage has with an environment, which knows ``max_tokens`` and scores."""
    return {"environment": ENVIRONMENT | changes, "score": None, "max_tokens": 60, "updates": 1}


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.mark.parametrize("kind", ["ppo", "grpo", "online_dpo"])
def test_a_stage_learns_from_episodes(kind: str, presser: Path, tmp_path: Path) -> None:
    context = make_stage(kind, tmp_path, presser, **fields(), eval_updates=1)
    metrics = STAGES[kind].runner()(context)
    assert metrics["turns_last"] > 1 and metrics["calls_last"] > 0
    lines = stored_rows(tmp_path / "output" / "rollouts")
    assert len(lines) == metrics["episodes"]
    for line in lines:
        assert len(line["response_mask"]) == line["tokens"] == len(line["token_texts"])
        roles = [message["role"] for message in line["messages"]]
        assert roles[:2] == ["user", "assistant"] and line["turns"] == roles.count("assistant")
    assert any(line["calls"] for line in lines)
    assert not list((tmp_path / "checkpoints" / "episodes").glob("*.jsonl"))


def test_a_score_adds_to_that_of_the_environment(presser: Path, tmp_path: Path) -> None:
    context = make_stage("grpo", tmp_path, presser, **fields() | {"score": "tests.support.stages.vowels:share"})
    STAGES["grpo"].runner()(context)
    lines = stored_rows(tmp_path / "output" / "rollouts")
    # The environment gives whole and half points, the function the share of vowels in the last turn.
    shares = share([], [line["response"] for line in lines])
    assert any(shares)
    for line, vowels in zip(lines, shares, strict=True):
        points = 2 * (line["score"] - vowels)
        assert points == pytest.approx(round(points), abs=1e-5)


def test_an_episode_has_the_tokens_that_its_environment_says() -> None:
    given = {name: value for name, value in {**COMMON, **fields()}.items() if name != "max_tokens"}
    config = STAGES["ppo"].config_class()(**given)
    assert config.max_tokens == 60 and "max_tokens" not in config.model_fields_set


@pytest.mark.parametrize(
    "changes",
    [
        {"class": "tests.support.environments.buttons:Missing"},
        {"tool_format": "auto"},
    ],
)
def test_unfit_environment_is_refused_before_the_engine_starts(
    refused: Refused, changes: dict[str, Any], presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr("align.stages.rl.open_engine", start)
    monkeypatch.setattr("align.stages.rl.load_for_tuning", start)
    context = make_stage("ppo", tmp_path, presser, **fields(**changes))
    refused(lambda: STAGES["ppo"].runner()(context))


def test_a_template_without_tools_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: STAGES["ppo"].runner()(make_stage("ppo", tmp_path, tiny_model, **fields())))


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({}, "continue lets servers take new weights between turns, but no servers sample for this stage"),
        ({"rollouts": {"servers": 1, "weights": "nccl"}}, "runtime.rollouts.weights is nccl"),
        ({"stages": {"ppo": {"rollouts": {"servers": 1}}}}, None),
    ],
)
def test_continuing_with_new_weights_needs_servers(
    refused: Refused, runtime: dict[str, Any], words: str | None
) -> None:
    ppo = {"stage": "ppo", "policy": "policy", "prompts": "prompts", "learning_rate": 1e-3, "environment": ENVIRONMENT}
    stages = {
        "policy": {"stage": "tests.support.stages.fixed_inputs:POLICY", "folder": "."},
        "prompts": {"stage": "tests.support.stages.fixed_inputs:PROMPTS", "count": 8},
        "ppo": {**ppo, "in_flight": "continue", "max_staleness": 1},
    }
    raw = {"name": "x", "runtime": runtime, "stages": stages}
    if words is None:
        assert Pipeline(raw, "p.yaml").nodes["ppo"].config.in_flight == "continue"
        return
    refused(Pipeline, raw, "p.yaml")
