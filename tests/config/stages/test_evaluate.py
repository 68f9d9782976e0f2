"""The policy that others are compared with, if the file names none."""

from __future__ import annotations

from align.config.stages.evaluate import EvaluateConfig
from align.config.validation import validate
from tests.support.refusals import Refused


def test_reference_is_the_first_policy_by_default() -> None:
    config = validate(EvaluateConfig, {"policies": ["sft", "ppo"], "prompts": "data"}, "file: stages.evaluate")
    assert config.reference == "sft"
    assert EvaluateConfig(policies=["sft", "ppo"], reference="ppo", prompts="data").reference == "ppo"
    assert "reference" not in EvaluateConfig.model_json_schema()["required"]


def test_mistaken_policies_are_one_mistake(refused: Refused) -> None:
    refused(validate, EvaluateConfig, {"policies": [], "prompts": "data"}, "file: stages.evaluate")
