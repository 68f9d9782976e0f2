"""How long a stage takes on given devices: the larger of computing and exchanging, step by step. Never imports torch.

Assumed, and said in docs/scaling.md: products reach a fixed share of a device's best rate (``EFFICIENCY``); exchanges
reach ``LINKED`` of a link and hide behind computing as far as they are shorter; sampling by vLLM is bound by reading
weights and cache from memory, or by its products. Left out: starting up, saving, scoring held-out rows, stragglers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.capacity.hardware import Device, Hardware
from align.capacity.job import Job
from align.capacity.strategies import Strategy
from align.models.activations import FLOAT, SIZES
from align.models.architecture import Architecture

EFFICIENCY = {True: 0.30, False: 0.50}
"""Share of the best rate that training reaches: on a GPU a guess for padded rows without fused kernels, on a processor
what was measured (54 %, docs/performance.md)."""
LINKED = 0.8
"""Share of a link's rate that a collective reaches."""
READING = 0.6
"""Share of the memory's rate that decoding reaches."""
HOP = 8e-6
"""Seconds that a collective needs for each doubling of the devices, whatever its size."""
HOST_LINK = 25e9
"""Bytes a second between a device and the machine's own memory (PCIe 4, 16 lanes)."""
HOST_STEP = 12e9
"""Bytes of AdamW's state a second that a processor works through for one device."""


@dataclass(frozen=True)
class Estimated:
    """Of a whole stage."""

    seconds: float
    computing: float
    """Seconds of products."""
    exchanging: float
    """Seconds of exchanges among devices, whether hidden or not."""
    moving: float
    """Seconds of copies from and to the machine's own memory."""
    sampling: float
    """Seconds of sampling."""
    flops: float
    """Floating-point operations on all devices together, those for checkpointing included."""
    tokens: float
    """Tokens learned from."""
    sampled: float
    sent: float
    """Bytes that one device sends to others."""


@dataclass(frozen=True)
class Traffic:
    """What one device sends in a stage."""

    sent: float
    collectives: int


def estimate(
    job: Job, hardware: Hardware, strategy: Strategy, micro_batch: int, rows: int, share: float = 1.0
) -> Estimated:
    """For ``rows`` rows in all, of ``share`` of the greatest length."""
    device, devices = hardware.device, hardware.devices
    work, steps = job.work(share), max(1, job.steps(rows))
    passes = steps * math.ceil(job.batch / (devices * micro_batch))
    again = work.again if strategy.checkpointing else 0.0
    flops = rows * (work.learning + again + work.scoring)
    rate = EFFICIENCY[device.gpu] * product_rate(device, SIZES[job.precision])
    computing = flops / devices / rate
    traffic = exchanged(job, strategy, devices, steps, passes)
    exchanging = _seconds(traffic, hardware)
    moving = _moving(job, strategy, devices, steps, passes)
    sampling = _sampling(job, hardware, rows, work.sampled)
    seconds = max(computing, exchanging) + moving + sampling
    return Estimated(
        seconds, computing, exchanging, moving, sampling, flops, rows * work.tokens, rows * work.sampled, traffic.sent
    )


def exchanged(job: Job, strategy: Strategy, devices: int, steps: int, passes: int) -> Traffic:
    """Rings: an all-gather or a reduce-scatter sends (N - 1) / N of the whole, an all-reduce twice that."""
    if devices == 1:
        return Traffic(0.0, 0)
    ring = (devices - 1) / devices
    layers = job.model.layers + 1
    if strategy.shares_weights:
        weights = FLOAT * job.gathered  # gathered in the forward pass and again in the backward pass
        sent = passes * ring * (2 * weights + FLOAT * job.trained)
        return Traffic(sent, passes * 3 * layers)
    gradients = FLOAT * job.trained
    if strategy.name == "ddp":
        return Traffic(steps * ring * 2 * gradients, steps * layers)
    # ZeRO-1 and 2: gradients go to their owners, updated weights come back
    reduced = passes if strategy.zero_stage == 2 else steps
    return Traffic(ring * (reduced + steps) * gradients, (reduced + steps) * layers)


def _seconds(traffic: Traffic, hardware: Hardware) -> float:
    device = hardware.device
    rate = device.link if hardware.nodes == 1 else min(device.link, device.network)
    return traffic.sent / (LINKED * rate) + traffic.collectives * HOP * math.log2(max(2, hardware.devices))


def _moving(job: Job, strategy: Strategy, devices: int, steps: int, passes: int) -> float:
    if strategy.offload == "none":
        return 0.0
    share = job.trained / devices
    step = steps * (2 * FLOAT * share / HOST_LINK + 4 * FLOAT * share / HOST_STEP)  # gradients there, weights back
    if strategy.offload == "optimizer":
        return step
    return step + passes * 2 * FLOAT * job.gathered / devices / HOST_LINK


def _sampling(job: Job, hardware: Hardware, rows: int, sampled: float) -> float:
    """Every rollout decodes its share of the sequences on each device, all at once, token by token."""
    if not job.rollout or not sampled:
        return 0.0
    device, size = hardware.device, SIZES[job.precision]
    together = math.ceil(job.rollout / hardware.devices)
    return rows / job.rollout * sampled * decoding_step(job.model, size, together, job.tokens(1) / 2, device)


def decoding_step(
    model: Architecture, size: int, together: int, held: float, device: Device, parallel: int = 1
) -> float:
    """Seconds of one token of ``together`` sequences, which hold ``held`` tokens each; ``parallel`` devices share it.

    Weights and cache are read whole, ``size`` bytes a number; every sequence costs a product with every weight.
    """
    weights = size * model.parameters
    cache = 2 * size * model.key_value_width * model.layers * together * held
    reading = (weights + cache) / (READING * device.bandwidth)
    products = 2 * model.parameters * together / (EFFICIENCY[device.gpu] * product_rate(device, size))
    return max(reading, products) / parallel


def product_rate(device: Device, size: int) -> float:
    """Operations a second at best of products of numbers of ``size`` bytes."""
    return device.flops if size == SIZES["bfloat16"] else device.flops_float32
