"""What a device holds of a stage, by hand: a model whose bytes can be counted on one's fingers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.capacity import estimate_training
from align.capacity.hardware import GIB, Strategy, candidate_strategies, parse_hardware
from align.capacity.memory import Memory, on_host
from align.capacity.sharding import BUCKET, Job, Setting, offloaded, sharded, training_way, training_ways
from align.config.runtime import HostPart
from align.config.stages.sft import SftConfig
from align.models.compute.layers import Layer, Linear
from tests.support.capacity.models import TOY, sft_job

ZERO2 = Strategy("deepspeed", 2)


def of(strategy: Strategy, devices: int, precision: str = "float32", **fields: Any) -> Memory:
    job = sft_job(precision, **fields)
    return sharded(job.memory(Setting(1)), job, strategy, devices)


def test_one_device_holds_everything_and_ddp_buckets_as_well() -> None:
    alone = of(Strategy("single"), 1)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.buffers) == (568, 568, 1136, 0)
    assert of(Strategy("ddp"), 2) == replace(alone, buffers=BUCKET + 568)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(1, 568, 568, 426), (2, 568, 142, 426), (3, 142, 142, 426)]
)
def test_zero_shares_out_one_thing_after_another(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    memory = of(Strategy("deepspeed", stage), 4)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)


def test_deepspeed_has_masters_with_the_optimizer_and_a_bucket() -> None:
    memory = of(ZERO2, 4, "bfloat16")
    assert (memory.weights, memory.gradients, memory.copies) == (568, 142, 2 * 50)
    assert (memory.optimizer, memory.buffers) == ((1136 + 568) // 4, BUCKET + 568)
    assert of(Strategy("deepspeed", 3), 4).buffers == BUCKET + 568 + 568  # all that it gathers is below its limit


def test_deepspeed_autocast_keeps_copies_with_checkpointing() -> None:
    again = {"checkpointing": True}
    job = sft_job("bfloat16")
    memory = {
        name: sharded(job.memory(Setting(1, **again)), job, Strategy(name, stage, **again), 4).copies
        for name, stage in (("fsdp2", 0), ("deepspeed", 3))
    }
    assert memory == {"fsdp2": 2 * 25, "deepspeed": 2 * 50}  # a layer's, both layers'


def test_sharded_weights_are_gathered_layer_by_layer() -> None:
    memory = of(Strategy("fsdp2"), 4)
    assert (memory.weights, memory.gradients, memory.optimizer) == (142, 142, 284)
    # two layers of 29, the embeddings and the head, 40 each; the gradients of the largest unit, 40
    assert memory.buffers == BUCKET + 4 * (2 * 29 + 80) + 4 * 40
    lora = of(Strategy("fsdp2"), 4, tuning={"method": "lora", "rank": 2})
    assert lora.buffers == BUCKET + 4 * (2 * 29 + 80)
    assert lora.gradients == 36  # 2 layers x 2 x (4 + 5) adapters, 4 bytes each, a quarter


def test_what_is_offloaded_waits_in_the_machine_s_memory() -> None:
    job = sft_job()
    away = Strategy("deepspeed", 2, offload="optimizer")
    assert of(away, 4).optimizer == 0
    assert offloaded(job.memory(Setting(1)), job, away, 4) == 426
    everything = Strategy("fsdp2", offload="all")
    assert (of(everything, 4).weights, of(everything, 4).gradients) == (0, 0)
    assert offloaded(job.memory(Setting(1)), job, everything, 4) == 142 + 142 + 284


def test_no_way_holds_more_than_plain_ddp() -> None:
    config = SftConfig(model="m", data="d", learning_rate=1e-3, max_length=512, batch_size=64)
    blocks = (Layer((Linear("q", 1024, 4096),), vectors=1024),) * 24
    large = replace(TOY, hidden=1024, embedded=10 * 1024, blocks=blocks)
    job = estimate_training.job(config, {"model": [large]}, None)
    plain = sharded(job.memory(Setting(1)), job, Strategy("ddp"), 8).peak(512)
    for strategy in candidate_strategies(8, checkpointing=False, host=()):
        assert sharded(job.memory(Setting(1)), job, strategy, 8).peak(512) <= plain, strategy.label
    sizes = [sharded(job.memory(Setting(1)), job, Strategy("fsdp2"), n).peak(512) for n in (1, 2, 4, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    memory = training_way(sft_job(batch_size=6), parse_hardware("4xh100"), Strategy("ddp"))
    assert "the batch of 6 rows does not divide among 4 devices" in memory.obstacle


PARTS: tuple[HostPart, ...] = ("optimizer", "activations", "base")


def turns(activations: int = 0, engine: int = 0, host: tuple[HostPart, ...] | None = None) -> Job:
    """A job of 10 GiB of frozen weights and 4 of optimizer state beside an engine with a cache of 1 GiB a sequence."""

    def memory(setting: Setting) -> Memory:
        kept = activations * GIB if "activations" not in setting.host else 0
        counted = Memory(
            weights=10 * GIB, base=10 * GIB, gradients=0, optimizer=4 * GIB, activations=kept, released="all",
            engine=engine * GIB, kv_cache=min(setting.cached, 16) * GIB if engine else 0,
        )  # fmt: skip
        return on_host(counted, setting.host)

    return replace(sft_job(), memory=memory, tokens=lambda rows: rows, host=host, host_parts=PARTS, batch=1)


@pytest.mark.parametrize(
    ("job", "host", "cached"),
    [
        (turns(activations=5), (), 16),  # 19 GiB of 21.6
        (turns(activations=9), ("optimizer",), 16),  # 23, and 19 without the state
        (turns(activations=12), ("activations",), 16),  # 26, 22, and 14 without the activations
        (turns(activations=20, engine=1), ("activations", "base"), 16),  # 27 while sampling, 21 without the base
        (turns(engine=4), ("optimizer", "base"), 16),  # 24 while sampling without the base
        (turns(engine=15), ("base",), 1),  # 31, and 20 with a cache for one sequence
    ],
)
def test_host_memory_is_the_last_resort(job: Job, host: tuple[HostPart, ...], cached: int) -> None:
    best = training_ways(job, parse_hardware("24gb"))[0]
    assert best.fits and (best.strategy.host, best.strategy.cached) == (host, cached)
    words = f", checkpointing, {' and '.join(host)} in host memory" if host else ""
    assert best.label == f"one device{words}"
    sizes = {"optimizer": 4 * GIB, "base": 10 * GIB, "activations": job.memory(Setting(1)).activations or 0}
    assert best.host_memory == sum(sizes[part] for part in host)


def test_parts_that_the_settings_name_are_kept() -> None:
    named = training_ways(turns(activations=9, host=()), parse_hardware("24gb"))
    assert not named[0].fits and {way.strategy.host for way in named} == {()}
    assert training_ways(turns(engine=10, host=()), parse_hardware("24gb"))[0].obstacle.startswith("the cache of")
    assert training_ways(turns(host=("base",)), parse_hardware("24gb"))[0].strategy.host == ("base",)


def test_cache_too_small_for_a_sequence_is_told() -> None:
    nearest = training_ways(turns(engine=22), parse_hardware("24gb"))[0]
    assert not nearest.fits and nearest.obstacle == (
        "the cache of the engine has no room for one sequence: sampling needs 23.7 GiB, usable are 22.3"
    )
