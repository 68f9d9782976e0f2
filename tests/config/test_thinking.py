"""The field ``thinking_budget`` of stages that sample."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.config.base import settings_for_key
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.policy_gradient import GrpoConfig
from align.config.stages.sample import SampleConfig

SAMPLE: dict[str, Any] = {"policy": "sft", "prompts": "data", "max_tokens": 64}
GRPO: dict[str, Any] = SAMPLE | {"score": "gold", "learning_rate": 1e-5}
EVALUATE: dict[str, Any] = {"policies": ["sft"], "reference": "sft", "prompts": "data", "max_tokens": 64}


@pytest.mark.parametrize(("config", "fields"), [(SampleConfig, SAMPLE), (GrpoConfig, GRPO), (EvaluateConfig, EVALUATE)])
def test_budget_leaves_room_for_an_answer(config: Any, fields: dict[str, Any]) -> None:
    assert config(**fields, thinking_budget=63).thinking_budget == 63
    with pytest.raises(
        ValidationError, match="thinking_budget 64 leaves no room for an answer in max_tokens 64; lower"
    ):
        config(**fields, thinking_budget=64)


@pytest.mark.parametrize(("config", "fields"), [(SampleConfig, SAMPLE), (GrpoConfig, GRPO), (EvaluateConfig, EVALUATE)])
def test_keys_omit_a_missing_budget(config: Any, fields: dict[str, Any]) -> None:
    for budget in (None, 10):
        settings = config(**fields, thinking_budget=budget)
        key = settings_for_key(settings, settings.model_dump(mode="json"))
        assert key.get("thinking_budget") == budget and ("thinking_budget" in key) == (budget is not None)


def test_budget_holds_for_tasks_and_turns() -> None:
    task = {"task": "gsm8k", "files": ["a.jsonl"], "max_tokens": 32}
    with pytest.raises(ValidationError, match=r"thinking_budget 32 leaves no room .* in tasks\.sums\.max_tokens 32"):
        EvaluateConfig(**EVALUATE, thinking_budget=32, tasks={"sums": task})
    environment = {"class": "games:Game", "max_turns": 2, "max_tokens": 64, "turn_max_tokens": 16}
    fields = {"policy": "sft", "prompts": "data", "learning_rate": 1e-5, "environment": environment}
    with pytest.raises(ValidationError, match="thinking_budget 16 leaves no room .* in turn_max_tokens 16"):
        GrpoConfig(**fields, thinking_budget=16)
