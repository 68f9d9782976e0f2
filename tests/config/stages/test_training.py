"""The shared fields: bounds, micro-batches, and trainer options checked without torch."""

import pytest

from align.config.runtime.launch import LaunchConfig
from align.config.stages.best_of_n import OnlineDpoConfig
from align.config.stages.continue_from import fixed_reason
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.stages.preference import DpoConfig, KtoConfig
from align.config.stages.sft import SftConfig
from align.training.arguments import total_steps

SFT = {"model": "model", "data": "data", "learning_rate": 1e-4}


def test_default_micro_batch_divides_the_batch() -> None:
    assert SftConfig(**SFT, batch_size=16).micro_batch == 8
    assert SftConfig(**SFT, batch_size=12).micro_batch == 6
    assert SftConfig(**SFT, batch_size=7).micro_batch == 7
    assert SftConfig(**SFT, batch_size=11).micro_batch == 1


def test_sizes_are_tried_until_one_row_is_left() -> None:
    assert SftConfig(**SFT, batch_size=16).micro_batch_sizes(1) == (8, 4, 2, 1)
    assert SftConfig(**SFT, batch_size=12).micro_batch_sizes(4) == (3, 1)
    assert SftConfig(**SFT, batch_size=16, micro_batch_size=4).micro_batch_sizes(1) == (4,)
    rollouts = {"policy": "sft", "prompts": "data", "score": "gold", "num_mini_batches": 1}
    # Sizes fill each process's 18 responses exactly, and the responses of a pair stay together.
    assert GrpoConfig(**rollouts, rollout_batch=36, samples_per_prompt=4).micro_batch_sizes(2) == (9, 3, 1)
    assert OnlineDpoConfig(**rollouts, rollout_batch=12).micro_batch_sizes(1) == (12, 6, 2)


def test_memory_fields_are_keyed_if_rows_are_compared() -> None:
    memory = {"micro_batch_size", "gradient_checkpointing"}
    answers = {"policy": "sft", "data": "data"}
    assert memory <= SftConfig(**SFT).fields_outside_key()
    kto = KtoConfig(**answers)
    assert memory & kto.fields_outside_key() == {"gradient_checkpointing"}
    assert kto.micro_batch_sizes(1) == (8,)
    assert memory <= KtoConfig(**answers, loss="apo_zero_unpaired").fields_outside_key()
    # Rows come in one order whatever the micro-batch, unless the loss compares a micro-batch's rows.
    assert SftConfig(**SFT, micro_batch_size=2).row_group == SftConfig(**SFT).row_group == 16
    assert KtoConfig(**answers, micro_batch_size=2).row_group == 2
    assert fixed_reason(SftConfig(**SFT), "micro_batch_size") is None
    assert fixed_reason(kto, "micro_batch_size") == "the loss compares the rows of a micro-batch"


def test_steps_count_short_batches_and_the_cap() -> None:
    assert total_steps("sft", SftConfig(**SFT, batch_size=16), 100) == 7  # 6.25 batches
    assert total_steps("sft", SftConfig(**SFT, batch_size=16, epochs=2), 100) == 14
    assert total_steps("sft", SftConfig(**SFT, batch_size=16, epochs=0.5), 100) == 4
    assert total_steps("sft", SftConfig(**SFT, batch_size=16, epochs=2, max_steps=5), 100) == 5
    assert total_steps("sft", SftConfig(**SFT, batch_size=16, max_steps=50), 100) == 7


PISSA = {"method": "lora", "rank": 4, "init": "pissa"}
ANCHORED = {**SFT, "anchor": {"to": "kl", "weight": 0.1}}
ONLINE = {"policy": "p", "prompts": "d", "score": "m:f", "learning_rate": 1e-4, "rollout_batch": 16}
IN_PARTS = LaunchConfig(processes=2, strategy="fsdp2")


@pytest.mark.parametrize(("kind", "fields"), [(PpoConfig, ONLINE), (GrpoConfig, ONLINE), (SftConfig, ANCHORED)])
def test_adapters_from_weights_refuse_kl_anchor_if_sharded(kind: type, fields: dict[str, object]) -> None:
    objection = kind(**fields, tuning=PISSA).processes_objection(IN_PARTS)
    assert "tuning.init makes the adapters a part of the initial policy" in objection and "take ddp" in objection
    assert kind(**fields, tuning={"method": "lora", "rank": 4}).processes_objection(IN_PARTS) is None
    assert kind(**fields, tuning=PISSA).processes_objection(LaunchConfig(processes=2)) is None


def test_adapters_from_weights_are_sharded_without_kl_anchor() -> None:
    """``dpo`` scores its reference before the model is shared out."""
    assert SftConfig(**SFT, tuning=PISSA).processes_objection(IN_PARTS) is None
    pairs = {"policy": "p", "data": "d", "learning_rate": 1e-4}
    assert DpoConfig(**pairs, tuning=PISSA).processes_objection(IN_PARTS) is None


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
@pytest.mark.parametrize("settings", [{}, {"replay_fraction": 0.0}])
def test_replay_needs_the_complete_model_in_each_process(strategy: str, settings: dict[str, object]) -> None:
    replaying = SftConfig(**SFT, replay="general", **settings)
    objection = replaying.processes_objection(LaunchConfig(processes=2, strategy=strategy))
    assert objection == f"replay does not go with strategy {strategy}; take ddp, or leave it out."
    assert replaying.processes_objection(LaunchConfig(processes=1, strategy=strategy)) is None
    assert replaying.processes_objection(LaunchConfig(processes=2)) is None


@pytest.mark.parametrize("extra", [{"ema": 0.9}, {"anchor": {"to": "l2", "weight": 0.1}}])
def test_sharded_model_accepts_l2_anchor_and_ema(extra: dict[str, object]) -> None:
    assert SftConfig(**SFT, **extra).processes_objection(IN_PARTS) is None
