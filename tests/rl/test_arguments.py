"""A trainer's arguments follow from the config of its stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainingArguments

from align.config.options import check_trainer_options
from align.config.options.field_dumps import class_options
from align.config.stages.best_of_n import OnlineDpoConfig
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.stages.rl import RolloutFields
from align.pipeline.registry import STAGES, load_object
from align.rl.arguments import DERIVED, RolloutArguments, rollout_arguments

NOT_IN_CONFIGS = {"critic_adam_epsilon", "reuse_forward", "padding_free", "share_prompts", "probe_parity"}
"""Options that no stage has a field for; ``trainer:`` passes them on."""
CONFIGS = [stage.config_class() for stage in STAGES.values() if issubclass(stage.config_class(), RolloutFields)]
OPTIONS: dict[str, Any] = {"output_dir": "x", "use_cpu": True, "report_to": "none"}


def test_counts_follow_from_config() -> None:
    config = PpoConfig.for_trainer(
        updates=5, rollout_batch=24, samples_per_prompt=4, num_epochs=3, num_mini_batches=2, micro_batch_size=4,
        save_updates=2, learning_rate=2e-5, weight_decay=0.1, max_grad_norm=0.5,
    )  # fmt: skip
    arguments = rollout_arguments(config, **OPTIONS)
    # 3 epochs of 2 mini-batches are 6 steps an update; 24 responses / 2 mini-batches / 4 are 3 micro-batches a step.
    assert (arguments.max_steps, arguments.logging_steps, arguments.save_steps) == (30, 6, 12)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 3)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (2e-5, 0.1, 0.5)
    assert (config.steps_per_update, config.prompts_per_update) == (6, 6)


@pytest.mark.parametrize("budget", [None, 7])
def test_fingerprint_names_a_budget_only_if_there_is_one(budget: int | None) -> None:
    config = PpoConfig.for_trainer(learning_rate=1e-6, thinking_budget=budget)
    fingerprint = rollout_arguments(config, **OPTIONS).fingerprint()
    assert fingerprint.get("thinking_budget", "absent") == ("absent" if budget is None else 7)


def test_epsilon_follows_from_method() -> None:
    ppo = rollout_arguments(PpoConfig.for_trainer(learning_rate=1e-6), **OPTIONS)
    grpo = rollout_arguments(GrpoConfig.for_trainer(learning_rate=1e-6), **OPTIONS)
    assert (ppo.adam_epsilon, ppo.critic_adam_epsilon, grpo.adam_epsilon) == (1e-5, 1e-8, 1e-8)
    config = PpoConfig.for_trainer(learning_rate=1e-6)
    assert rollout_arguments(config, **OPTIONS, adam_epsilon=1e-7).adam_epsilon == 1e-7


def test_precision_auto_is_what_the_stage_measured() -> None:
    config = PpoConfig.for_trainer(learning_rate=1e-6)
    assert not rollout_arguments(config, **OPTIONS).bf16
    assert rollout_arguments(config, precision="bfloat16", **OPTIONS).bf16
    assert rollout_arguments(PpoConfig.for_trainer(learning_rate=1e-6, precision="bfloat16"), **OPTIONS).bf16


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config: config.__name__)
def test_config_of_script_has_the_checks_of_a_stage(config_class: type[RolloutFields]) -> None:
    arguments = rollout_arguments(config_class.for_trainer(learning_rate=1e-6), **OPTIONS)
    assert arguments.fingerprint()["rollout_batch"] == arguments.config.rollout_batch
    with pytest.raises(ValidationError, match="updates"):
        config_class.for_trainer(learning_rate=1e-6, updates=0)
    with pytest.raises(ValueError, match="learning_rate is auto, and the size of the model is not known here"):
        rollout_arguments(config_class.for_trainer(), **OPTIONS)


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_option_that_config_decides_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not set here: (set '.* in the config|every update is logged)"):
        rollout_arguments(PpoConfig.for_trainer(learning_rate=1e-6), **OPTIONS, **{name: 1})


def test_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = OnlineDpoConfig.for_trainer(learning_rate=1e-6, rollout_batch=16)
    with pytest.raises(ValueError, match="not a multiple of 3 processes"):
        rollout_arguments(config, **OPTIONS)


def test_reuse_forward_accepts_shares_only() -> None:
    config = PpoConfig.for_trainer(learning_rate=1e-6)
    for share in (0.0, 0.5, 1.0):
        assert rollout_arguments(config, **OPTIONS, reuse_forward=share).reuse_forward == share
    for share in (-0.5, 1.5):
        with pytest.raises(ValueError, match=f"^reuse_forward is {share}; it is a share of micro-batches"):
            rollout_arguments(config, **OPTIONS, reuse_forward=share)


def test_arguments_add_only_options_without_a_field() -> None:
    fields = {field.name for field in dataclasses.fields(RolloutArguments)}
    transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - transformers == NOT_IN_CONFIGS


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config: config.__name__)
def test_fields_of_stage_are_no_options(config_class: type[RolloutFields]) -> None:
    arguments = load_object(config_class.trainer_class)
    assert set(class_options(config_class.trainer_class)) == {f.name for f in dataclasses.fields(arguments) if f.init}
    for name in config_class.model_fields:
        with pytest.raises(ValueError, match=f"^'{name}' is not set here"):
            check_trainer_options(
                config_class.trainer_class, {name: 1}, config_class.model_fields, config_class.owned_options
            )
