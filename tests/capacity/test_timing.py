"""Seconds and bytes by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.capacity.estimators import rl as memory_rl
from align.capacity.estimators import training as memory_training
from align.capacity.hardware import Hardware, parse_hardware
from align.capacity.layouts import Strategy
from align.capacity.timing import ASSUMED, FASTEST, SLOWEST, Passes, training_time, training_traffic
from align.config.stages.ppo import PpoConfig
from align.config.stages.sft import SftConfig
from align.config.tuning import FullTuning, LoraTuning
from align.models.flops import forward_flops, learning_flops
from tests.support.capacity.models import TOY, sft_job


def test_operations_by_hand() -> None:
    # 3 tokens: 2 x 50 in the matrices, 2 x 4 x 10 for the head, 2 layers x 2 x 4 features x 3 tokens of length
    assert forward_flops(TOY, 3, 3) == 3 * (2 * 50 + 2 * 2 * 4 * 3)
    assert forward_flops(TOY, 3, 3, head=2) == forward_flops(TOY, 3, 3) + 2 * 2 * 40
    assert learning_flops(TOY, FullTuning(), 3, 3) == 3 * forward_flops(TOY, 3, 3)
    assert learning_flops(TOY, LoraTuning(), 3, 3) == 2 * forward_flops(TOY, 3, 3)
    # the backward pass ends at the second of two layers; embeddings that are trained are below both
    assert learning_flops(TOY, LoraTuning(last_layers=1), 3, 3) == 1.5 * forward_flops(TOY, 3, 3)
    low = LoraTuning(last_layers=1, save_modules=["embed_tokens"])
    assert learning_flops(TOY, low, 3, 3) == 2 * forward_flops(TOY, 3, 3)


def test_what_each_way_sends() -> None:
    job = sft_job()  # 142 parameters, 568 bytes; 3 layers with the embeddings
    assert training_traffic(job, Strategy("ddp"), 1, Passes(10, 20)).sent == 0
    assert training_traffic(job, Strategy("ddp"), 4, Passes(10, 20)).sent == pytest.approx(10 * 0.75 * 2 * 568)
    assert training_traffic(job, Strategy("deepspeed", 1), 4, Passes(10, 20)).sent == pytest.approx(
        0.75 * (10 * 568 + 10 * 568)
    )
    assert training_traffic(job, Strategy("deepspeed", 2), 4, Passes(10, 20)).sent == pytest.approx(
        0.75 * (20 * 568 + 10 * 568)
    )
    assert training_traffic(job, Strategy("fsdp2"), 4, Passes(10, 20)).sent == pytest.approx(20 * 0.75 * 3 * 568)
    assert training_traffic(job, Strategy("fsdp2"), 4, Passes(10, 20)).collectives == 20 * 3 * 3


def test_a_stage_takes_its_operations_over_the_rate() -> None:
    job, hardware = sft_job(batch_size=4), parse_hardware("h100")
    estimate = training_time(job, hardware, Strategy("single"), 4, 100)
    flops = 100 * learning_flops(TOY, FullTuning(), 8, 8, 8)
    assert estimate.flops == flops
    assert estimate.seconds == pytest.approx(flops / (ASSUMED[True].products * hardware.device.flops_float32))
    again = training_time(job, hardware, Strategy("single", checkpointing=True), 4, 100)
    assert again.flops == pytest.approx(flops * 4 / 3)
    assert (estimate.tokens, estimate.sampled, estimate.sent) == (800, 0, 0)


def test_the_range_is_that_of_the_assumed_efficiency() -> None:
    job, hardware = sft_job(batch_size=4), parse_hardware("h100")
    estimate = training_time(job, hardware, Strategy("single"), 4, 100)
    assert estimate.fastest == pytest.approx(estimate.seconds * 0.30 / FASTEST[True].products)
    assert estimate.slowest == pytest.approx(estimate.seconds * 0.30 / SLOWEST[True].products)
    assert FASTEST[True].products > ASSUMED[True].products > SLOWEST[True].products
    assert estimate.to_json()["measured_on_gpu"] is False


def test_rows_half_as_long_take_less_than_half() -> None:
    full, half = (
        training_time(sft_job(), parse_hardware("h100"), Strategy("single"), 1, 100, fill=share) for share in (1.0, 0.5)
    )
    assert half.flops < full.flops / 2
    assert half.tokens == full.tokens / 2


def test_other_machines_are_behind_a_slower_link() -> None:
    job = sft_job(batch_size=64)
    inside, across = (
        training_time(job, parse_hardware(text), Strategy("ddp"), 1, 6400).exchanging for text in ("8xh100", "8x1xh100")
    )
    assert across > inside > 0


def test_ppo_samples_and_learns_what_its_config_says() -> None:
    config = PpoConfig(
        policy="p", prompts="d", score="gold", learning_rate=1e-3, updates=3, rollout_batch=8, samples_per_prompt=4,
        num_epochs=2, max_prompt_tokens=6, max_tokens=4, critic="head", precision="float32",
    )  # fmt: skip
    job = memory_rl.job(config, {"policy": [TOY]}, parse_runtime())
    estimate = training_time(job, parse_hardware("h100"), Strategy("single"), 8, job.rows(None) or 0)
    assert job.rows(None) == 24 and job.steps(24) == 6
    assert estimate.sampled == 24 * 4
    assert estimate.tokens == 24 * 2 * (6 / 4 + 4)  # a prompt is run once for its four responses; two epochs
    assert estimate.sampling > 0


def parse_runtime():
    from align.config.runtime import Runtime

    return Runtime.model_validate({"engine": {"name": "transformers"}})


@given(st.sampled_from(["ddp", "fsdp2"]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 8))
def test_more_devices_compute_less_each_and_never_send_less_than_nothing(name, devices, micro) -> None:
    config = SftConfig(model="m", data="d", learning_rate=1e-3, batch_size=128)
    job = memory_training.job(config, {"model": [TOY]}, None)
    device = parse_hardware("h100").device
    alone, many = (training_time(job, Hardware(device, 1, n), Strategy(name), micro, 1280) for n in (1, devices))
    assert many.computing == pytest.approx(alone.computing / devices)
    assert many.seconds >= many.computing and many.sent >= 0
    slower = replace(device, link=device.link / 10)
    assert training_time(job, Hardware(slower, 1, devices), Strategy(name), micro, 1280).seconds >= many.seconds
