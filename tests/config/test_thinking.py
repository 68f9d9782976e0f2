"""The field ``thinking_budget`` of stages that sample."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.base import settings_for_key
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.policy_gradient import GrpoConfig
from align.config.stages.sample import SampleConfig
from align.config.stages.sft import DistillConfig
from align.extensions.synthesis.config import SynthesizeConfig
from tests.support.refusals import Refused

SAMPLE: dict[str, Any] = {"policy": "sft", "prompts": "data", "max_tokens": 64}
GRPO: dict[str, Any] = SAMPLE | {"score": "gold", "learning_rate": 1e-5}
EVALUATE: dict[str, Any] = {"policies": ["sft"], "reference": "sft", "prompts": "data", "max_tokens": 64}
SYNTHESIZE: dict[str, Any] = {"task": {"type": "responses"}, "model": "sft", "prompts": "data", "max_tokens": 64}
DISTILL: dict[str, Any] = {
    "model": "sft",
    "teacher": "big",
    "data": "data",
    "learning_rate": 1e-5,
    "on_policy": 1.0,
    "max_tokens": 64,
}
STAGES = [
    (SampleConfig, SAMPLE),
    (GrpoConfig, GRPO),
    (EvaluateConfig, EVALUATE),
    (SynthesizeConfig, SYNTHESIZE),
    (DistillConfig, DISTILL),
]


@pytest.mark.parametrize(("config", "fields"), STAGES)
def test_budget_leaves_room_for_an_answer(refused: Refused, config: Any, fields: dict[str, Any]) -> None:
    assert config(**fields, thinking_budget=63).thinking_budget == 63
    refused(config, **fields, thinking_budget=64)


@pytest.mark.parametrize(("config", "fields"), STAGES)
def test_keys_omit_a_missing_budget(config: Any, fields: dict[str, Any]) -> None:
    for budget in (None, 10):
        settings = config(**fields, thinking_budget=budget)
        key = settings_for_key(settings, settings.model_dump(mode="json"))
        assert key.get("thinking_budget") == budget and ("thinking_budget" in key) == (budget is not None)


def test_budget_holds_for_tasks_and_turns(refused: Refused) -> None:
    task = {"task": "gsm8k", "files": ["a.jsonl"], "max_tokens": 32}
    refused(EvaluateConfig, **EVALUATE, thinking_budget=32, tasks={"sums": task})
    environment = {"class": "games:Game", "max_turns": 2, "max_tokens": 64, "turn_max_tokens": 16}
    fields = {"policy": "sft", "prompts": "data", "learning_rate": 1e-5, "environment": environment}
    refused(GrpoConfig, **fields, thinking_budget=16)


def test_budget_of_distill_needs_sampled_answers_of_its_tokens(refused: Refused) -> None:
    refused(DistillConfig, **{**DISTILL, "on_policy": 0.0, "thinking_budget": 8})
    refused(DistillConfig, **{**DISTILL, "teacher": {"stage": "big", "tokens": "aligned"}, "thinking_budget": 8})
