"""What a device holds of a stage, by hand: a model whose bytes can be counted on one's fingers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.capacity import memory_training
from align.capacity.choosing import option
from align.capacity.hardware import parse_hardware
from align.capacity.job import Job, Setting
from align.capacity.memory import Memory
from align.capacity.sharing import BUCKET, offloaded, shared
from align.capacity.strategies import Strategy, candidates
from align.config.stages.sft import SftConfig
from align.models.architecture import Architecture, Linear

TOY = Architecture("toy", hidden=4, layers=2, vocabulary=10, key_value_width=3, linears=(Linear("q", 4, 5, True),),
                   vectors=4, embedded=40, last_norm=4, tied=False)  # fmt: skip
# A layer: 25 in its matrix with its bias, 4 in its norm. The trunk: 44 + 2 * 29 = 102; the head 40.
ZERO2 = Strategy("deepspeed", 2)


def job(precision: str = "float32", **fields: Any) -> Job:
    config = SftConfig(model="m", data="d", learning_rate=1e-3, precision=precision, max_length=8, **fields)
    return memory_training.job(config, {"model": [TOY]}, None)


def of(strategy: Strategy, devices: int, precision: str = "float32", **fields: Any) -> Memory:
    made = job(precision, **fields)
    return shared(made.memory(Setting(1)), made, strategy, devices)


def test_one_device_holds_everything_and_ddp_buckets_as_well() -> None:
    alone = of(Strategy("single"), 1)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.buffers) == (568, 568, 1136, 0)
    assert of(Strategy("ddp"), 2) == replace(alone, buffers=BUCKET + 568)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(1, 568, 568, 426), (2, 568, 142, 426), (3, 142, 142, 426)]
)
def test_zero_shares_out_one_thing_after_another(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    found = of(Strategy("deepspeed", stage), 4)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_deepspeed_has_masters_with_the_optimizer_and_a_bucket() -> None:
    found = of(ZERO2, 4, "bfloat16")
    assert (found.weights, found.gradients, found.copies) == (568, 142, 2 * 50)
    assert (found.optimizer, found.buffers) == ((1136 + 568) // 4, BUCKET + 568)
    assert of(Strategy("deepspeed", 3), 4).buffers == BUCKET + 568 + 568  # all that it gathers is below its limit


def test_deepspeed_s_own_autocast_keeps_copies_where_checkpointing_spares_them() -> None:
    again = {"checkpointing": True}
    made = job("bfloat16")
    found = {
        name: shared(made.memory(Setting(1, **again)), made, Strategy(name, stage, **again), 4).copies
        for name, stage in (("fsdp2", 0), ("deepspeed", 3))
    }
    assert found == {"fsdp2": 2 * 25, "deepspeed": 2 * 50}  # a layer's, both layers'


def test_sharded_weights_are_gathered_layer_by_layer() -> None:
    found = of(Strategy("fsdp2"), 4)
    assert (found.weights, found.gradients, found.optimizer) == (142, 142, 284)
    # two layers of 29, the embeddings and the head, 40 each; the gradients of the largest unit, 40
    assert found.buffers == BUCKET + 4 * (2 * 29 + 80) + 4 * 40
    lora = of(Strategy("fsdp2"), 4, tuning={"method": "lora", "rank": 2})
    assert lora.buffers == BUCKET + 4 * (2 * 29 + 80)
    assert lora.gradients == 36  # 2 layers x 2 x (4 + 5) adapters, 4 bytes each, a quarter


def test_what_is_offloaded_waits_in_the_machine_s_memory() -> None:
    made = job()
    away = Strategy("deepspeed", 2, offload="optimizer")
    assert of(away, 4).optimizer == 0
    assert offloaded(made.memory(Setting(1)), made, away, 4) == 426
    everything = Strategy("fsdp2", offload="all")
    assert (of(everything, 4).weights, of(everything, 4).gradients) == (0, 0)
    assert offloaded(made.memory(Setting(1)), made, everything, 4) == 142 + 142 + 284


def test_no_way_holds_more_than_plain_ddp() -> None:
    config = SftConfig(model="m", data="d", learning_rate=1e-3, max_length=512, batch_size=64)
    large = replace(TOY, hidden=1024, embedded=10 * 1024, linears=(Linear("q", 1024, 4096),), vectors=1024, layers=24)
    made = memory_training.job(config, {"model": [large]}, None)
    plain = shared(made.memory(Setting(1)), made, Strategy("ddp"), 8).peak(512)
    for strategy in candidates(8, False):
        assert shared(made.memory(Setting(1)), made, strategy, 8).peak(512) <= plain, strategy.label
    sizes = [shared(made.memory(Setting(1)), made, Strategy("fsdp2"), n).peak(512) for n in (1, 2, 4, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    found = option(job(batch_size=6), parse_hardware("4xh100"), Strategy("ddp"), 100, 1.0)
    assert "the batch of 6 rows does not divide among 4 devices" in found.why_not
