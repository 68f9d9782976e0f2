"""Settings of tasks during training: what is refused before anything is loaded, and keys that stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.base import settings_for_key
from align.config.runtime.launch import LaunchConfig
from align.config.stages.policy_gradient import GrpoConfig
from align.config.stages.sft import SftConfig
from align.config.validation import validate
from align.pipeline.registry import STAGES
from tests.support.refusals import Refused

SFT = {"model": "model", "data": "data", "learning_rate": 1e-4}
GRPO = {"policy": "model", "prompts": "data", "score": "gsm8k_answer", "learning_rate": 1e-4}
COMMIT = "a" * 40


def sft(**fields: Any) -> SftConfig:
    return validate(SftConfig, SFT | fields, "stages.sft")


def evaluation(**fields: Any) -> dict[str, Any]:
    return {"every": 5, "tasks": {"gsm8k": {"files": ["dev.jsonl"]}}} | fields


def test_hub_split_for_development_is_accepted() -> None:
    config = sft(evaluate=evaluation(tasks={"gsm8k": {"revision": COMMIT, "split": "train"}}))
    assert config.evaluate is not None and list(config.evaluate.tasks) == ["gsm8k"]


def test_rl_chooses_by_metric_without_validations(refused: Refused) -> None:
    chosen = {"keep": "best", "evaluate": evaluation(best_metric="gsm8k.final")}
    assert validate(GrpoConfig, GRPO | chosen, "here").best_metric == "gsm8k.final"
    for wrong in ({"keep": "last"}, {"keep_kl": 1.0, "eval_updates": 1}):
        refused(validate, GrpoConfig, GRPO | chosen | wrong, "here")
    refused(lambda: validate(GrpoConfig, GRPO | {"evaluate": evaluation(tasks={"preference": {}})}, "here"))


def test_rows_are_held_back_only_for_loss_or_pairs() -> None:
    assert sft(keep="best", eval_steps=5).holds_back
    assert not sft(keep="best", evaluate=evaluation(best_metric="gsm8k.final")).holds_back
    assert sft(evaluate=evaluation(tasks={"preference": {}})).holds_back


def test_time_is_limited_unless_a_metric_chooses() -> None:
    assert sft(evaluate=evaluation()).evaluate.time_limit == 0.1
    chosen = evaluation(best_metric="gsm8k.final")
    assert sft(keep="best", evaluate=chosen).evaluate.time_limit is None
    assert sft(keep="best", evaluate=chosen | {"at_most": 0.2}).evaluate.time_limit == 0.2


@pytest.mark.parametrize("config_class", [SftConfig, GrpoConfig])
def test_sharded_models_are_refused(config_class: Any) -> None:
    fields = SFT if config_class is SftConfig else GRPO
    config = validate(config_class, fields | {"evaluate": evaluation()}, "here")
    sharded = LaunchConfig.model_validate({"processes": 2, "strategy": "fsdp2"})
    assert "take ddp, or evaluate the finished checkpoint" in config.processes_objection(sharded)
    assert config.processes_objection(LaunchConfig(processes=2)) is None


def test_keys_count_settings_and_content_of_tasks(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text('{"question": "1 + 1", "answer": "#### 2"}\n', encoding="utf-8")

    def key(config: SftConfig) -> tuple[Any, dict[str, str]]:
        dumped = config.model_dump(mode="python", exclude=config.fields_outside_key())
        return settings_for_key(config, dumped), STAGES["sft"].identities(config, tmp_path)

    plain, first = sft(), sft(evaluate=evaluation())
    assert "evaluate" not in key(plain)[0] and key(plain)[1] == {}
    identities = key(first)[1]
    assert key(sft(evaluate=evaluation(every=6)))[1] != identities
    file.write_text('{"question": "1 + 2", "answer": "#### 3"}\n', encoding="utf-8")
    assert key(first)[1] != identities
