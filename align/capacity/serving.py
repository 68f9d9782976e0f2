"""Which way of sampling is cheapest among those that fit, and what to change where none does. Never torch.

The stage's phases follow each other: engines sample and are closed, then reward models score, then checkpoints read.
Shown is the fullest. vLLM on a GPU may take ``runtime.engine.gpu_memory`` of it and no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from align.capacity.choosing import greatest
from align.capacity.engines import (
    GPUS_OF_A_MACHINE,
    EngineWay,
    asked_for,
    candidates,
    cannot_be_parted,
    engine_here,
    parted,
)
from align.capacity.hardware import DEVICES, GIB, Hardware
from align.capacity.inference import Inference, Lot, reading_memory, sampling_memory
from align.capacity.serving_time import Spent, spent
from align.config.runtime import Runtime
from align.config.vllm_servers import RolloutsConfig
from align.models.activations import FLOAT, SIZES

MOST_SEQUENCES = 1 << 20
"""Greatest number of sequences at a time that is looked for."""
PEAK_OF_A_CARD = 0.9
"""``gpu_memory`` that a remedy tries."""


@dataclass(frozen=True)
class Serving:
    """One way to run a stage that samples or scores."""

    way: EngineWay
    at_once: int
    """Sequences that each engine decodes at a time; 0 where not even one fits, or where nothing is sampled."""
    largest: int
    """The greatest number of them that would fit, whatever ``runtime.engine.batch_size`` says."""
    phase: str
    """When a device is fullest: ``loading``, ``sampling``, ``scoring by …``, ``reading by …``."""
    parts: dict[str, int]
    """Bytes of a device then, by what they are for; with one sequence where none fits."""
    time: Spent | None
    why_not: str = ""
    wanted: int = 0
    """Sequences at a time that the settings ask for."""
    asked_for: bool = False
    """Whether the run's settings name this way, so that no other is tried."""

    @property
    def label(self) -> str:
        """The way's."""
        return self.way.label

    @property
    def peak(self) -> int:
        """Bytes of a device, driver and libraries included."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Words, bytes and seconds."""
        return {
            "way": self.way.label,
            "engine": self.way.engine,
            "engines": self.way.engines,
            "tensor_parallel": self.way.parallel,
            "sequences_at_once": self.at_once or None,
            "largest_at_once": self.largest or None,
            "fullest_while": self.phase,
            "peak": self.peak,
            "parts": self.parts,
            "fits": not self.why_not,
            "why_not": self.why_not or None,
            "time": None if self.time is None else vars(self.time),
        }


def servings(asked: Inference, runtime: Runtime, hardware: Hardware, share: float) -> list[Serving]:
    """Every way, or the one that the run asks for; those that fit come first, the fastest of them at the head."""
    given = asked_for(runtime, hardware) if asked.lots else EngineWay("none", "transformers")
    ways = candidates(runtime, hardware) if given is None else [given]
    found = [replace(serving(asked, runtime, hardware, way, share), asked_for=given is not None) for way in ways]
    return sorted(found, key=lambda one: (bool(one.why_not), one.time.seconds if one.time else one.peak))


def serving(asked: Inference, runtime: Runtime, hardware: Hardware, way: EngineWay, share: float) -> Serving:
    """What one way costs."""
    alone = _alone(runtime, hardware)
    lots = () if way.kind in ("elsewhere", "none") else asked.lots
    device, why, largest = hardware.device, way.why_not, 0
    wanted = [min(_asked_at_once(lot, way), alone.engine.batch_size) for lot in lots]
    if lots and device.gpu and way.engine == "vllm" and way.together * alone.engine.gpu_memory > 1:
        wanted_each = f"{alone.engine.gpu_memory:g} of it (runtime.engine.gpu_memory)"
        why = why or f"{way.together} engines stand on one device, and each takes {wanted_each}"
    for lot in lots:
        why = why or cannot_be_parted(lot.model, way.parallel)
    if lots and not why:
        largest = min(_largest(lot, asked, alone, hardware, way) for lot in lots)
        why = _too_little(asked, alone, hardware, way, lots) if largest == 0 else ""
    parted_well = not lots or not any(cannot_be_parted(lot.model, way.parallel) for lot in lots)
    at_once = [min(number, largest or 1) for number in wanted]
    phases = _phases(asked, alone, hardware, way, list(zip(lots, at_once, strict=True)) if parted_well else [])
    name, parts = max(phases, key=lambda one: sum(one[1].values()))
    after = [(which, sum(one.values())) for which, one in phases if which not in ("sampling", "loading")]
    usable = device.usable + device.context
    for which, amount in after:
        if amount > usable and not why:
            why = f"{which} needs {amount / GIB:.1f} GiB on one device, usable are {usable / GIB:.1f}"
    if why:
        return Serving(way, 0, largest, name, parts, None, why)
    if not asked.timed:
        return Serving(way, max(at_once, default=0), largest, name, parts, None, wanted=max(wanted, default=0))
    time = spent(asked, [(lot, number, engine_of_lot(lot, way)) for lot, number in zip(lots, at_once, strict=True)],
                 hardware, way, share, runtime.engine.dtype)  # fmt: skip
    return Serving(way, max(at_once, default=0), largest, name, parts, time, wanted=max(wanted, default=0))


def engine_of_lot(lot: Lot, way: EngineWay) -> str:
    """The engine that samples it."""
    return "transformers" if lot.plain and way.kind in ("process", "samplers") else way.engine


def _alone(runtime: Runtime, hardware: Hardware) -> Runtime:
    """The same settings for one engine of one process on the planned device, which vLLM is taken to run on."""
    kind = "cuda" if hardware.device.gpu else "cpu"
    return runtime.model_copy(update={"rollouts": RolloutsConfig(), "device": kind})


def _asked_at_once(lot: Lot, way: EngineWay) -> int:
    """Sequences that the busiest engine is given at a time."""
    given = lot.call if lot.sequences is None else min(lot.sequences, lot.call)
    return max(1, -(-given // way.engines))


def _engine_parts(
    lot: Lot, asked: Inference, alone: Runtime, hardware: Hardware, way: EngineWay, number: int
) -> dict[str, int]:
    """Bytes by part of one engine on one device."""
    engine, gpu = engine_of_lot(lot, way), hardware.device.gpu
    settings = alone.engine.model_copy(update={"name": engine, "batch_size": max(number, alone.engine.batch_size)})
    runtime = alone.model_copy(update={"engine": settings})
    parts = sampling_memory(lot, runtime, asked.precision, number, engine, gpu)
    wanted = alone.engine.dtype
    size = SIZES[asked.precision if wanted == "auto" else wanted]
    weights, cache = parted(lot.model, parts["engine"], parts["kv_cache"], size, way.parallel)
    return parts | {"engine": weights, "kv_cache": cache}


def _room(hardware: Hardware, alone: Runtime, way: EngineWay, engine: str) -> int:
    """Bytes for one engine on a device, its process's driver included."""
    device = hardware.device
    if engine == "vllm" and device.gpu:
        return min(int(alone.engine.gpu_memory * device.memory), (device.usable + device.context) // way.together)
    outside = device.context if way.kind == "servers" and not device.gpu else 0  # the stage's own process
    return (device.usable + device.context - outside) // way.together


def _fits(lot: Lot, asked: Inference, alone: Runtime, hardware: Hardware, way: EngineWay, number: int) -> bool:
    parts = _engine_parts(lot, asked, alone, hardware, way, number)
    engine, device = engine_of_lot(lot, way), hardware.device
    if engine == "vllm" and not device.gpu:  # its cache is set aside, and must hold them
        size = SIZES[asked.precision if alone.engine.dtype == "auto" else alone.engine.dtype]
        needed = 2 * size * lot.model.key_value_width * lot.model.layers * number * lot.length
        if parted(lot.model, 0, needed, size, way.parallel)[1] > parts["kv_cache"]:
            return False
    return sum(parts.values()) + device.context <= _room(hardware, alone, way, engine)


def _largest(lot: Lot, asked: Inference, alone: Runtime, hardware: Hardware, way: EngineWay) -> int:
    return greatest(lambda number: _fits(lot, asked, alone, hardware, way, number), MOST_SEQUENCES)


def _too_little(asked: Inference, alone: Runtime, hardware: Hardware, way: EngineWay, lots: tuple[Lot, ...]) -> str:
    """Why not even one sequence at a time fits."""
    device = hardware.device
    lot = next(one for one in lots if not _fits(one, asked, alone, hardware, way, 1))
    engine = engine_of_lot(lot, way)
    parts, room = _engine_parts(lot, asked, alone, hardware, way, 1), _room(hardware, alone, way, engine)
    needed = sum(parts.values()) + device.context
    each = f"each of {way.together} engines on a device" if way.together > 1 else "the engine"
    if needed <= room:
        size = f"{alone.engine.cpu_kv_cache_gb:g} GiB (runtime.engine.cpu_kv_cache_gb)"
        return f"one sequence of {lot.length} tokens does not fit into a cache of {size}"
    limit = ""
    if engine == "vllm" and device.gpu and room == int(alone.engine.gpu_memory * device.memory):
        limit = f" (runtime.engine.gpu_memory {alone.engine.gpu_memory:g})"
    return f"one sequence of {lot.length} tokens needs {needed / GIB:.1f} GiB, {each} has {room / GIB:.1f}{limit}"


def _phases(
    asked: Inference, alone: Runtime, hardware: Hardware, way: EngineWay, lots: list[tuple[Lot, int]]
) -> list[tuple[str, dict[str, int]]]:
    """Bytes of the fullest device by part, while engines sample and while each reading is made."""
    device, found = hardware.device, []
    for lot, number in lots:
        parts = _engine_parts(lot, asked, alone, hardware, way, number)
        whole = {name: way.together * amount for name, amount in parts.items()}
        apart = way.kind == "servers" and not device.gpu
        found.append(("sampling", whole | {"context": (way.together + apart) * device.context}))
        if not device.gpu and engine_of_lot(lot, way) == "transformers":
            found.append(("loading", _loading(lot, parts["engine"], hardware)))
    for reading in asked.readings:
        parts = reading_memory(reading, asked.precision)
        found.append((f"reading by {reading.who}" if reading.words else f"scoring by {reading.who}",
                      parts | {"context": device.context}))  # fmt: skip
    found = [(name, {part: amount for part, amount in parts.items() if amount}) for name, parts in found]
    return found or [("waiting", {"context": device.context})]


def _loading(lot: Lot, weights: int, hardware: Hardware) -> dict[str, int]:
    """Bytes on a processor while float32 weights are rounded, out of a file that is mapped meanwhile.

    The system takes its pages back where it needs them, so they are no reason not to fit.
    """
    device = hardware.device
    whole = FLOAT * lot.model.parameters
    mapped = min(whole, max(0, device.usable - weights)) if weights < whole else 0
    return {"engine": weights, "file": mapped, "context": device.context}


def remedies(asked: Inference, runtime: Runtime, hardware: Hardware, others: dict[str, Inference]) -> list[str]:
    """What makes it fit, each tried out: settings of the engine, more devices of a machine, another card, ``others``.

    Those are the stage with settings of its own that need less, by the words of the command line for them.
    """

    def fits(wanted: Inference, settings: Runtime, there: Hardware) -> bool:
        return not servings(wanted, settings, there, 1.0)[0].why_not

    found = []
    engine = runtime.engine
    if (
        hardware.device.gpu
        and engine.gpu_memory < PEAK_OF_A_CARD
        and (fits(asked, _with(runtime, gpu_memory=PEAK_OF_A_CARD), hardware))
    ):
        found.append(f"--set runtime.engine.gpu_memory={PEAK_OF_A_CARD:g}")
    if engine.name == "transformers" and fits(asked, _with(runtime, name="vllm"), hardware):
        found.append("--set runtime.engine.name=vllm")
    for count in GPUS_OF_A_MACHINE:
        wider = replace(hardware, per_node=count)
        if hardware.device.gpu and count > hardware.per_node and fits(asked, runtime, wider):
            found.append(f"--hardware {wider.label}")
            break
    for card in sorted(DEVICES.values(), key=lambda device: device.price or 0.0):
        other = replace(hardware, device=card)
        if card.name != hardware.device.name and fits(asked, runtime, other):
            found.append(f"--hardware {other.label}")
            break
    return found + [words for words, changed in others.items() if fits(changed, runtime, hardware)]


def _with(runtime: Runtime, **fields: Any) -> Runtime:
    return runtime.model_copy(update={"engine": runtime.engine.model_copy(update=fields)})


def notes(asked: Inference, runtime: Runtime, hardware: Hardware, best: Serving | None) -> list[str]:
    """What to know about the numbers, one sentence each."""
    found = list(asked.notes)
    engine, gpu = engine_here(runtime), hardware.device.gpu
    kind = "none" if best is None else best.way.kind
    if kind == "elsewhere":
        found.append("Servers that run already sample: what they hold and the time they take are not counted.")
    elif asked.lots and runtime.engine.name == "auto" and not runtime.rollouts.pooled:
        found.append(f"runtime.engine.name is auto, which comes to {engine} on this machine.")
    if gpu and best is not None and best.way.engine == "vllm" and kind not in ("elsewhere", "none"):
        found.append(
            f"vLLM takes {runtime.engine.gpu_memory:g} of the card (gpu_memory) for engine and cache, needed or not."
        )
    if hardware.nodes > 1 and kind != "samplers" and asked.lots:
        found.append(
            f"Engines are on one of the {hardware.nodes} machines: runtime.ray.samplers or running servers "
            "(runtime.rollouts.addresses) take the others."
        )
    return found
