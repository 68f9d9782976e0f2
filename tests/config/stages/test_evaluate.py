"""The policy that others are compared with, if the file names none."""

from __future__ import annotations

import pytest

from align.config.stages.evaluate import EvaluateConfig
from align.config.validation import validate
from align.errors import UserError


def test_reference_is_the_first_policy_by_default() -> None:
    config = validate(EvaluateConfig, {"policies": ["sft", "ppo"], "prompts": "data"}, "file: stages.evaluate")
    assert config.reference == "sft"
    assert EvaluateConfig(policies=["sft", "ppo"], reference="ppo", prompts="data").reference == "ppo"
    assert "reference" not in EvaluateConfig.model_json_schema()["required"]


def test_mistaken_policies_are_one_mistake() -> None:
    with pytest.raises(UserError) as raised:
        validate(EvaluateConfig, {"policies": [], "prompts": "data"}, "file: stages.evaluate")
    assert str(raised.value).count("\n") == 0 and "policies" in str(raised.value)
