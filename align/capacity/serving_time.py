"""How long sampling and scoring take on given devices, lot by lot. Never imports torch.

Assumed as in ``timing.py``: products reach ``EFFICIENCY`` of a device's rate, decoding ``READING`` of its memory's.
Engines share the sequences evenly, all of full length; what is scored or read goes through the stage's one device.
Left out: starting engines, loading models, scores by programs, and that short responses end before long ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.capacity.engines import EngineWay
from align.capacity.hardware import Device, Hardware
from align.capacity.inference import Inference, Lot
from align.capacity.timing import EFFICIENCY, HOP, LINKED, decoding_step, product_rate
from align.models.activations import SIZES
from align.models.flops import forward_flops

Sampled = tuple[Lot, int, str]
"""A lot, the sequences of it that an engine decodes at a time, and the engine."""


@dataclass(frozen=True)
class Spent:
    """Of a whole stage."""

    seconds: float
    sampling: float
    """Seconds that engines read prompts and decode, exchanges included."""
    scoring: float
    """Seconds of reward models and of checkpoints that read."""
    exchanging: float
    """Seconds of exchanges among the devices of one engine."""
    flops: float
    """Floating-point operations on all devices together."""
    sampled: float
    """Tokens sampled."""
    read: float
    """Tokens read: of prompts by engines, of rows by reward models and checkpoints."""


def spent(asked: Inference, lots: list[Sampled], hardware: Hardware, way: EngineWay, share: float, dtype: str) -> Spent:
    """For every row, of ``share`` of the greatest length; ``dtype`` is the engine's own setting."""
    device = hardware.device
    size = SIZES[asked.precision if dtype == "auto" else dtype]  # type: ignore[index]
    sampling = exchanging = flops = sampled = read = 0.0
    for lot, at_once, engine in lots:
        if not lot.sequences:
            continue
        cached = engine != "transformers"  # vLLM keeps a prompt's keys and values for its other sequences
        prompts = lot.prompts if cached else lot.sequences
        busy = min(way.engines, lot.sequences)
        sent = _exchanged(lot, at_once, prompts, way, share, device, size, busy)
        sampling += _sampling(lot, at_once, prompts, way, share, device, size, busy) + sent
        exchanging += sent
        flops += lot.flops(share, cached)
        sampled += share * lot.sequences * lot.response
        read += share * prompts * lot.prompt
    scored = sum(reading.flops(share) for reading in asked.readings)
    scoring = scored / (EFFICIENCY[device.gpu] * product_rate(device, SIZES[asked.precision]))
    read += sum(share * (reading.rows or 0) * reading.length for reading in asked.readings)
    return Spent(sampling + scoring, sampling, scoring, exchanging, flops + scored, sampled, read)


def _steps(lot: Lot, at_once: int, share: float, busy: int) -> float:
    """Tokens that an engine decodes one after another: its share of the sequences, so many at a time."""
    rounds = max(1.0, math.ceil((lot.sequences or 0) / busy) / at_once)
    return share * lot.response * rounds


def _sampling(
    lot: Lot, at_once: int, prompts: int, way: EngineWay, share: float, device: Device, size: int, busy: int
) -> float:
    prompt = share * lot.prompt
    rate = EFFICIENCY[device.gpu] * product_rate(device, size)
    reading = prompts * forward_flops(lot.model, prompt, prompt) / (busy * way.parallel) / rate
    held = share * (lot.prompt + lot.response / 2)  # half of a response is there on average
    step = decoding_step(lot.model, size, at_once, held, device, way.parallel)
    return _crowding(way, busy) * (reading + _steps(lot, at_once, share, busy) * step)


def _crowding(way: EngineWay, busy: int) -> float:
    """How much longer engines take that share a device."""
    return max(1.0, way.together * busy / way.engines)


def _exchanged(
    lot: Lot, at_once: int, prompts: int, way: EngineWay, share: float, device: Device, size: int, busy: int
) -> float:
    """Seconds of two all-reduces a layer, of what each token is there: rings, as in ``timing.exchanged``."""
    if way.parallel == 1:
        return 0.0
    each = 2 * lot.model.layers
    ring = 2 * (way.parallel - 1) / way.parallel * size * lot.model.hidden
    steps = _steps(lot, at_once, share, busy)
    tokens = steps * at_once + share * prompts / busy * lot.prompt
    return each * (tokens * ring / (LINKED * device.link) + steps * HOP * math.log2(way.parallel))
