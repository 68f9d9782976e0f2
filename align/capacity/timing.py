"""Time of a stage on given devices, as a range. Never imports torch, and nothing here was measured on a GPU.

A run reaches only a share of what data sheets promise (``Efficiency``). Every time is computed for three sets of
shares: the assumed ones and two bounds. ``docs/scaling.md`` lists them with their reasons.

Exchanges among devices hide behind computing as far as they are shorter. Decoding is bound by reading weights and cache
from memory, or by its matrix products. Engines share the sequences evenly, and all sequences have the full length.
Rewards and checkpoints score on the stage's one device. Left out: start-up, loading, saving, held-out rows, stragglers,
rewards by programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from align.capacity.hardware import Device, Hardware
from align.capacity.inference import Inference, SamplingLoad
from align.capacity.job import Job
from align.capacity.layouts import EngineLayout, EngineName, Strategy
from align.models.activations import FLOAT, SIZES
from align.models.architecture import Architecture
from align.models.flops import forward_flops


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's data-sheet rates that a run reaches."""

    products: float
    """Of the rate of matrix products."""
    links: float
    """Of a link's rate, in a collective."""
    memory: float
    """Of the memory's rate, in decoding."""


ASSUMED = {True: Efficiency(0.30, 0.8, 0.6), False: Efficiency(0.50, 0.8, 0.6)}
"""Shares by whether the device is a GPU. On a GPU a guess without fused kernels; on a processor close
to what was measured (54 %, docs/performance.md)."""
SLOWEST = {True: Efficiency(0.20, 0.5, 0.4), False: Efficiency(0.40, 0.5, 0.4)}
"""Lower bounds of the shares."""
FASTEST = {True: Efficiency(0.45, 0.9, 0.8), False: Efficiency(0.60, 0.9, 0.8)}
"""Upper bounds of the shares."""
HOP = 8e-6
"""Seconds that a collective needs for each doubling of the devices, whatever its size."""
HOST_LINK = 25e9
"""Bytes per second between a device and the machine's own memory (PCIe 4, 16 lanes)."""
HOST_STEP = 12e9
"""Bytes of AdamW's state per second that a processor updates for one device."""


@dataclass(frozen=True)
class TimeEstimate:
    """Time and work of one stage. Seconds are for the assumed efficiency; ``fastest`` and ``slowest`` bound them."""

    seconds: float
    computing: float = 0.0
    """Seconds of matrix products in training."""
    exchanging: float = 0.0
    """Seconds of exchanges among devices, hidden ones included."""
    moving: float = 0.0
    """Seconds of copies from and to the machine's own memory."""
    sampling: float = 0.0
    """Seconds in which engines read prompts and decode, their exchanges included."""
    scoring: float = 0.0
    """Seconds of reward models, and of checkpoints that read texts."""
    flops: float = 0.0
    """Floating-point operations on all devices together, recomputation included."""
    tokens: float = 0.0
    """Tokens trained on."""
    sampled: float = 0.0
    """Tokens sampled."""
    read: float = 0.0
    """Tokens of prompts that engines read, and of rows that reward models and checkpoints read."""
    sent: float = 0.0
    """Bytes that one device sends to others."""
    fastest: float = 0.0
    """Seconds with the upper bounds of every efficiency."""
    slowest: float = 0.0
    """Seconds with the lower bounds of every efficiency."""

    def to_json(self) -> dict[str, Any]:
        """Return every number, marked as not measured."""
        return asdict(self) | {"measured_on_gpu": False}


def _with_range(estimate: Callable[[Efficiency], TimeEstimate], is_gpu: bool) -> TimeEstimate:
    """Return the estimate for the assumed efficiency, with the seconds of both bounds."""
    return replace(
        estimate(ASSUMED[is_gpu]),
        fastest=estimate(FASTEST[is_gpu]).seconds,
        slowest=estimate(SLOWEST[is_gpu]).seconds,
    )


# ---- training ----


@dataclass(frozen=True)
class Traffic:
    """Exchanges of one device in a stage."""

    sent: float
    """Bytes."""
    collectives: int


@dataclass(frozen=True)
class Passes:
    """Optimizer steps of a stage, and the micro-batches of one device in them."""

    steps: int
    micro_batches: int


def training_time(
    job: Job, hardware: Hardware, strategy: Strategy, micro_batch: int, rows: int, *, fill: float = 1.0
) -> TimeEstimate:
    """Return the time of training on ``rows`` rows, whose mean length is ``fill`` of the greatest."""
    device, devices = hardware.device, hardware.devices
    steps = max(1, job.steps(rows))
    # A step reads the full batch: the devices share it, each in so many micro-batches.
    passes = Passes(steps, steps * math.ceil(job.batch / (devices * micro_batch)))
    work = job.work(fill)
    recomputed = work.recomputation if strategy.checkpointing else 0.0
    flops = rows * (work.learning + recomputed + work.scoring)
    traffic = training_traffic(job, strategy, devices, passes)
    moving = _offload_seconds(job, strategy, devices, passes)

    def estimate(efficiency: Efficiency) -> TimeEstimate:
        # Work divides evenly among devices, at the share of the data sheet's rate that is assumed.
        computing = flops / devices / (efficiency.products * product_rate(device, SIZES[job.precision]))
        exchanging = _exchange_seconds(traffic, hardware, efficiency)
        sampling = _rollout_seconds(job, hardware, rows, work.sampled, efficiency)
        return TimeEstimate(
            # exchanges overlap with computing; the longer of both remains
            seconds=max(computing, exchanging) + moving + sampling,
            computing=computing,
            exchanging=exchanging,
            moving=moving,
            sampling=sampling,
            flops=flops,
            tokens=rows * work.tokens,
            sampled=rows * work.sampled,
            sent=traffic.sent,
        )

    return _with_range(estimate, device.gpu)


def training_traffic(job: Job, strategy: Strategy, devices: int, passes: Passes) -> Traffic:
    """Return what one device sends. Collectives are rings.

    An all-gather or a reduce-scatter sends (N - 1) / N of the tensor, an all-reduce twice that.
    """
    if devices == 1:
        return Traffic(0.0, 0)
    ring = (devices - 1) / devices
    layers = job.model.layers + 1
    gradients = FLOAT * job.trained
    if strategy.shards_weights:
        weights = FLOAT * job.gathered
        # weights are gathered in the forward pass and again in the backward pass
        sent = passes.micro_batches * ring * (2 * weights + gradients)
        return Traffic(sent, passes.micro_batches * 3 * layers)
    if strategy.name == "ddp":
        return Traffic(passes.steps * ring * 2 * gradients, passes.steps * layers)
    # ZeRO-1 and 2: gradients go to their owners, updated weights come back
    reductions = passes.micro_batches if strategy.zero_stage == 2 else passes.steps
    exchanges = reductions + passes.steps
    return Traffic(ring * exchanges * gradients, exchanges * layers)


def _exchange_seconds(traffic: Traffic, hardware: Hardware, efficiency: Efficiency) -> float:
    device = hardware.device
    rate = device.link if hardware.nodes == 1 else min(device.link, device.network)
    # Many small collectives are bound by latency, few large ones by the link.
    latency = traffic.collectives * HOP * math.log2(max(2, hardware.devices))
    return traffic.sent / (efficiency.links * rate) + latency


def _offload_seconds(job: Job, strategy: Strategy, devices: int, passes: Passes) -> float:
    if strategy.offload == "none":
        return 0.0
    shard = job.trained / devices
    # gradients to the processor and weights back, and AdamW's step there
    step = passes.steps * (2 * FLOAT * shard / HOST_LINK + 4 * FLOAT * shard / HOST_STEP)
    if strategy.offload == "optimizer":
        # Only the optimizer moves. With ``all``, weights come back over the bus in every pass too.
        return step
    return step + passes.micro_batches * 2 * FLOAT * job.gathered / devices / HOST_LINK


def _rollout_seconds(job: Job, hardware: Hardware, rows: int, sampled: float, efficiency: Efficiency) -> float:
    """Return the seconds of all rollouts: each device decodes its share of a rollout at once, token by token."""
    if not job.rollout or not sampled:
        return 0.0
    size = SIZES[job.precision]
    sequences = math.ceil(job.rollout / hardware.devices)
    # half of a row's tokens are in the cache on average
    step = decoding_step(job.model, size, sequences, job.tokens(1) / 2, hardware.device, efficiency=efficiency)
    return rows / job.rollout * sampled * step


# ---- sampling and scoring ----


@dataclass(frozen=True)
class ScheduledLoad:
    """A sampling load, the engine that samples it, and the sequences that each engine decodes at a time."""

    load: SamplingLoad
    engine: EngineName
    batch: int


def inference_time(
    inference: Inference,
    schedule: Sequence[ScheduledLoad],
    hardware: Hardware,
    layout: EngineLayout,
    *,
    fill: float,
    engine_dtype: str,
) -> TimeEstimate:
    """Return the time of sampling and scoring every row, whose mean length is ``fill`` of the greatest.

    ``engine_dtype`` is ``runtime.engine.dtype``; ``auto`` follows the stage's precision.
    """
    size = SIZES[inference.precision if engine_dtype == "auto" else engine_dtype]  # type: ignore[index]
    timed = [scheduled for scheduled in schedule if scheduled.load.sequences]

    def estimate(efficiency: Efficiency) -> TimeEstimate:
        engines = [_EngineTime(scheduled, layout, hardware.device, fill, size, efficiency) for scheduled in timed]
        return _inference_time(inference, engines, hardware.device, fill, efficiency)

    return _with_range(estimate, hardware.device.gpu)


def _inference_time(
    inference: Inference, engines: list[_EngineTime], device: Device, fill: float, efficiency: Efficiency
) -> TimeEstimate:
    scoring_flops = sum(load.flops(fill) for load in inference.scoring)
    scoring_seconds = scoring_flops / (efficiency.products * product_rate(device, SIZES[inference.precision]))
    sampling = sum(engine.seconds + engine.exchanging for engine in engines)
    read = sum(fill * engine.prompts * engine.load.prompt_tokens for engine in engines)
    read += sum(fill * (load.rows or 0) * load.length for load in inference.scoring)
    return TimeEstimate(
        seconds=sampling + scoring_seconds,
        sampling=sampling,
        scoring=scoring_seconds,
        exchanging=sum(engine.exchanging for engine in engines),
        flops=sum(engine.flops for engine in engines) + scoring_flops,
        sampled=sum(fill * engine.sequences * engine.load.response_tokens for engine in engines),
        read=read,
    )


@dataclass(frozen=True)
class _EngineTime:
    """Time of one sampling load on the engines of a layout."""

    scheduled: ScheduledLoad
    layout: EngineLayout
    device: Device
    fill: float
    size: int
    """Bytes of a number in the engine."""
    efficiency: Efficiency

    @property
    def load(self) -> SamplingLoad:
        """The sequences."""
        return self.scheduled.load

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.load.sequences or 0

    @property
    def shares_prompts(self) -> bool:
        """True for vLLM, which keeps a prompt's keys and values for its other sequences."""
        return self.scheduled.engine != "transformers"

    @property
    def prompts(self) -> int:
        """Number of prompts that the engines read."""
        return self.load.prompts if self.shares_prompts else self.sequences

    @property
    def _busy(self) -> int:
        """Engines that get any sequence at all."""
        return min(self.layout.engines, self.sequences)

    @property
    def flops(self) -> float:
        """Floating-point operations of all sequences."""
        return self.load.flops(self.fill, self.shares_prompts)

    @property
    def _steps(self) -> float:
        """Tokens that one engine decodes one after another: its share of the sequences, ``batch`` at a time."""
        # Batches follow each other; a last batch that is not full counts as a fraction.
        rounds = max(1.0, math.ceil(self.sequences / self._busy) / self.scheduled.batch)
        return self.fill * self.load.response_tokens * rounds

    @property
    def seconds(self) -> float:
        """Seconds of reading prompts and decoding."""
        load, parallel = self.load, self.layout.tensor_parallel
        prompt = self.fill * load.prompt_tokens
        rate = self.efficiency.products * product_rate(self.device, self.size)
        reading = self.prompts * forward_flops(load.model, prompt, prompt) / (self._busy * parallel) / rate
        cached = self.fill * (load.prompt_tokens + load.response_tokens / 2)  # half of a response on average
        step = decoding_step(
            load.model,
            self.size,
            self.scheduled.batch,
            cached,
            self.device,
            efficiency=self.efficiency,
            tensor_parallel=parallel,
        )
        return self._slowdown * (reading + self._steps * step)

    @property
    def _slowdown(self) -> float:
        """Factor by which engines that share a device are slower."""
        return max(1.0, self.layout.engines_per_device * self._busy / self.layout.engines)

    @property
    def exchanging(self) -> float:
        """Seconds of tensor parallelism: two all-reduces of every token's features in each layer, as rings."""
        parallel, model = self.layout.tensor_parallel, self.load.model
        if parallel == 1:
            return 0.0
        ring = 2 * (parallel - 1) / parallel * self.size * model.hidden
        steps = self._steps
        tokens = steps * self.scheduled.batch + self.fill * self.prompts / self._busy * self.load.prompt_tokens
        sending = tokens * ring / (self.efficiency.links * self.device.link)
        return 2 * model.layers * (sending + steps * HOP * math.log2(parallel))


# ---- both ----


def decoding_step(
    model: Architecture,
    size: int,
    sequences: int,
    cached_tokens: float,
    device: Device,
    *,
    efficiency: Efficiency,
    tensor_parallel: int = 1,
) -> float:
    """Return the seconds of one decoding step of ``sequences`` sequences with ``cached_tokens`` tokens each.

    A step reads all weights and the whole cache, ``size`` bytes a number, and multiplies every sequence's features with
    every weight. The slower of both counts.
    """
    weights = size * model.parameters
    cache = 2 * size * model.key_value_width * model.layers * sequences * cached_tokens
    reading = (weights + cache) / (efficiency.memory * device.bandwidth)
    products = 2 * model.parameters * sequences / (efficiency.products * product_rate(device, size))
    # Memory-bound for few sequences, bound by products for many.
    return max(reading, products) / tensor_parallel


def product_rate(device: Device, size: int) -> float:
    """Return a device's best rate of matrix products of numbers of ``size`` bytes, in operations per second."""
    return device.flops if size == SIZES["bfloat16"] else device.flops_float32
