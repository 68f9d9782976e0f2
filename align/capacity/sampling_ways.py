"""The cheapest way to sample and score for a stage, and remedies if none fits. Never imports torch.

The stage's phases follow each other: engines sample and are closed, then reward models score, then checkpoints read.
The fullest phase decides. vLLM on a GPU may use ``runtime.engine.gpu_memory`` of it and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from align.capacity.hardware import DEVICES, GIB, Hardware
from align.capacity.inference import Inference, SamplingLoad, sampling_memory, scoring_memory, user_memory
from align.capacity.layouts import (
    GPUS_OF_A_MACHINE,
    EngineLayout,
    EngineName,
    candidate_layouts,
    local_engine,
    requested_layout,
    tensor_parallel_bytes,
    tensor_parallel_obstacle,
)
from align.capacity.timing import ScheduledLoad, inference_time
from align.capacity.ways import Way, by_preference, largest_that_fits
from align.config.runtime import Runtime
from align.config.vllm_servers import RolloutsConfig
from align.models.activations import FLOAT, SIZES

MAX_SEQUENCES = 1 << 20
"""Greatest number of sequences at a time that is tried."""
LARGE_GPU_MEMORY = 0.9
"""``gpu_memory`` that a remedy tries."""


def sampling_ways(inference: Inference, runtime: Runtime, hardware: Hardware, fill: float) -> list[Way]:
    """Return every way to sample, or only the one that the run names; those that fit first, the fastest at the head.

    ``fill`` is the mean length of rows as a share of the greatest.
    """
    requested = EngineLayout("none", "transformers")
    if inference.sampling:
        named = requested_layout(runtime, hardware)
        if named is None:
            layouts = candidate_layouts(runtime, hardware)
            ways = [sampling_way(inference, runtime, hardware, layout, fill) for layout in layouts]
            return sorted(ways, key=by_preference)
        requested = named
    return [replace(sampling_way(inference, runtime, hardware, requested, fill), is_requested=True)]


def sampling_way(inference: Inference, runtime: Runtime, hardware: Hardware, layout: EngineLayout, fill: float) -> Way:
    """Return memory and time of one layout."""
    return _SamplingPlan(inference, runtime, hardware, layout).way(fill)


class _Engine:
    """One engine that samples one load on the devices of a layout."""

    def __init__(
        self, load: SamplingLoad, inference: Inference, runtime: Runtime, hardware: Hardware, layout: EngineLayout
    ) -> None:
        self.load, self.layout, self.device = load, layout, hardware.device
        self.precision = inference.precision
        self.runtime = runtime
        """Settings of one engine in one process on the planned device."""
        in_process = layout.placement in ("process", "samplers")
        self.name: EngineName = "transformers" if load.needs_transformers and in_process else layout.engine
        dtype = runtime.engine.dtype
        self.bytes_per_number = SIZES[inference.precision if dtype == "auto" else dtype]

    @property
    def wanted(self) -> int:
        """Sequences that the busiest engine gets at a time, at most ``runtime.engine.batch_size``."""
        load = self.load
        # Sequences arrive call by call; the engines share each call evenly.
        call = load.call if load.sequences is None else min(load.sequences, load.call)
        return min(max(1, -(-call // self.layout.engines)), self.runtime.engine.batch_size)

    @property
    def obstacle(self) -> str:
        """Reason why the engine cannot run on these devices, whatever their memory; empty if it can."""
        return tensor_parallel_obstacle(self.load.model, self.layout.tensor_parallel)

    def parts(self, sequences: int) -> dict[str, int]:
        """Return the bytes of the engine on one device while it decodes ``sequences`` at a time, by purpose."""
        # ``engine_memory`` counts at most ``batch_size`` sequences, so a larger number needs a larger setting.
        batch_size = max(sequences, self.runtime.engine.batch_size)
        settings = self.runtime.engine.model_copy(update={"name": self.name, "batch_size": batch_size})
        runtime = self.runtime.model_copy(update={"engine": settings})
        parts = sampling_memory(self.load, runtime, self.precision, sequences, self.name, gpu=self.device.gpu)
        weights, cache = tensor_parallel_bytes(
            self.load.model, parts["engine"], parts["kv_cache"], self.bytes_per_number, self.layout.tensor_parallel
        )
        parts |= {"engine": weights, "kv_cache": cache}
        if self.load.user is not None:
            # Beside servers it is in the stage's own process, on another device maybe; it is counted here all the same.
            user, user_cache = user_memory(self.load.user, runtime, self.precision, sequences)
            parts |= {"user": user, "kv_cache": cache + user_cache}
        return parts

    @property
    def room(self) -> int:
        """Bytes that the engine may use on a device, the driver of its process included."""
        device, engines = self.device, self.layout.engines_per_device
        available = device.usable + device.context
        if self.name == "vllm" and device.gpu:
            return min(int(self.runtime.engine.gpu_memory * device.memory), available // engines)
        # on a processor the stage's own process has its libraries beside the servers
        stage = device.context if self.layout.placement == "servers" and not device.gpu else 0
        return (available - stage) // engines

    def fits(self, sequences: int) -> bool:
        """Return whether the engine can decode ``sequences`` at a time."""
        parts = self.parts(sequences)
        if self.name == "vllm" and not self.device.gpu:
            # on a processor vLLM's cache has a fixed size, which must hold the sequences
            model = self.load.model
            needed = 2 * self.bytes_per_number * model.key_value_width * model.layers * sequences * self.load.length
            parallel = self.layout.tensor_parallel
            _, needed_here = tensor_parallel_bytes(model, 0, needed, self.bytes_per_number, parallel)
            if needed_here > parts["kv_cache"]:
                return False
        return sum(parts.values()) + self.device.context <= self.room

    @property
    def largest(self) -> int:
        """The most sequences at a time that fit; 0 for none."""
        return largest_that_fits(self.fits, MAX_SEQUENCES)

    @property
    def shortage(self) -> str:
        """Reason why not even one sequence fits."""
        length, room, settings = self.load.length, self.room, self.runtime.engine
        needed = sum(self.parts(1).values()) + self.device.context
        if needed <= room:
            size = f"{settings.cpu_kv_cache_gb:g} GiB (runtime.engine.cpu_kv_cache_gb)"
            return f"one sequence of {length} tokens does not fit into a cache of {size}"
        limit = ""
        if self.name == "vllm" and self.device.gpu and room == int(settings.gpu_memory * self.device.memory):
            limit = f" (runtime.engine.gpu_memory {settings.gpu_memory:g})"
        engines = self.layout.engines_per_device
        each = f"each of {engines} engines on a device" if engines > 1 else "the engine"
        return f"one sequence of {length} tokens needs {needed / GIB:.1f} GiB, {each} has {room / GIB:.1f}{limit}"

    def sampling_parts(self, sequences: int) -> dict[str, int]:
        """Return the bytes of the fullest device while all of its engines decode, by purpose."""
        engines = self.layout.engines_per_device
        parts = {name: engines * amount for name, amount in self.parts(sequences).items()}
        processes = engines
        if self.layout.placement == "servers" and not self.device.gpu:
            processes += 1  # the stage's own process
        return parts | {"context": processes * self.device.context}

    def loading_parts(self, sequences: int) -> dict[str, int]:
        """Return the bytes on a processor while float32 weights of a mapped file are rounded.

        The system reclaims the file's pages when it needs them, so they never keep an engine from fitting.
        """
        weights = self.parts(sequences)["engine"]
        file = FLOAT * self.load.model.parameters
        mapped = min(file, max(0, self.device.usable - weights)) if weights < file else 0
        return {"engine": weights, "file": mapped, "context": self.device.context}


class _SamplingPlan:
    """One layout of a stage that samples and scores."""

    def __init__(self, inference: Inference, runtime: Runtime, hardware: Hardware, layout: EngineLayout) -> None:
        self.inference, self.hardware, self.layout = inference, hardware, layout
        # The planned device, not this machine's, and one engine alone: the layout multiplies it afterwards.
        kind = "cuda" if hardware.device.gpu else "cpu"
        one_engine = runtime.model_copy(update={"rollouts": RolloutsConfig(), "device": kind})
        loads = () if layout.placement in ("external", "none") else inference.sampling
        self.engines = [_Engine(load, inference, one_engine, hardware, layout) for load in loads]
        self.settings = one_engine.engine

    def way(self, fill: float) -> Way:
        """Return memory and time."""
        # 1. Obstacles that no memory removes.
        indivisible = next((engine.obstacle for engine in self.engines if engine.obstacle), "")
        obstacle = self.layout.obstacle or self._crowding() or indivisible
        # 2. The most sequences at a time that fit.
        largest = 0
        if self.engines and not obstacle:
            # Engines of one stage run one after the other, so each must fit, and the tightest sets the limit.
            largest = min(engine.largest for engine in self.engines)
            if largest == 0:
                obstacle = next(engine.shortage for engine in self.engines if not engine.fits(1))
        # 3. Memory of each phase at the sequences that the engines will take.
        batches = [min(engine.wanted, largest or 1) for engine in self.engines]
        phases = self._phases([] if indivisible else batches)
        # A phase with the most bytes decides whether the stage fits.
        phase = max(phases, key=lambda name: sum(phases[name].values()))
        obstacle = obstacle or self._scoring_obstacle(phases)
        batch = 0 if obstacle else max(batches, default=0)
        wanted = max((engine.wanted for engine in self.engines), default=0)
        # 4. Time, if the way fits and the size of some load is known.
        time = None
        if not obstacle and self.inference.has_known_time:
            schedule = [
                ScheduledLoad(engine.load, engine.name, number)
                for engine, number in zip(self.engines, batches, strict=True)
            ]
            time = inference_time(
                self.inference,
                schedule,
                self.hardware,
                self.layout,
                fill=fill,
                engine_dtype=self.settings.dtype,
            )
        return Way(self.layout, batch, largest, phases[phase], time, obstacle, phase, wanted=0 if obstacle else wanted)

    def _crowding(self) -> str:
        """Say why vLLM engines cannot share a GPU; empty if they can."""
        layout, share = self.layout, self.settings.gpu_memory
        on_gpu = self.hardware.device.gpu and layout.engine == "vllm"
        if not self.engines or not on_gpu or layout.engines_per_device * share <= 1:
            return ""
        return (
            f"{layout.engines_per_device} engines share one device, and each takes {share:g} of it "
            "(runtime.engine.gpu_memory)"
        )

    def _phases(self, batches: list[int]) -> dict[str, dict[str, int]]:
        """Return the bytes of the fullest device in each phase, by purpose; the fullest of a phase that repeats.

        ``batches`` has the sequences that each engine decodes at a time; empty if no engine can run.
        """
        device = self.hardware.device
        phases: list[tuple[str, dict[str, int]]] = []
        for engine, sequences in zip(self.engines if batches else [], batches, strict=True):
            phases.append(("sampling", engine.sampling_parts(sequences)))
            if not device.gpu and engine.name == "transformers":
                phases.append(("loading", engine.loading_parts(sequences)))
        for scoring in self.inference.scoring:
            name = f"scoring by {scoring.name}" if scoring.is_reward_model else f"reading by {scoring.name}"
            parts = scoring_memory(scoring, self.inference.precision, gpu=device.gpu)
            phases.append((name, parts | {"context": device.context}))
        fullest: dict[str, dict[str, int]] = {}
        for name, parts in phases:
            present = {part: amount for part, amount in parts.items() if amount}
            if sum(present.values()) > sum(fullest.get(name, {}).values()):
                fullest[name] = present
        return fullest or {"waiting": {"context": device.context}}

    def _scoring_obstacle(self, phases: Mapping[str, Mapping[str, int]]) -> str:
        """Say which model that scores or reads is too large for one device; empty if none is."""
        usable = self.hardware.device.usable + self.hardware.device.context
        for name, parts in phases.items():
            needed = sum(parts.values())
            if name not in ("sampling", "loading") and needed > usable:
                return f"{name} needs {needed / GIB:.1f} GiB on one device, usable are {usable / GIB:.1f}"
        return ""


def sampling_remedies(
    inference: Inference, runtime: Runtime, hardware: Hardware, smaller: Mapping[str, Inference]
) -> list[str]:
    """Return command-line options with which the stage fits; each was tried.

    They are settings of the engine, more devices of a machine, another card, or one of ``smaller``: the stage with its
    own settings reduced, by the option that asks for it.
    """

    def fits(load: Inference, settings: Runtime, devices: Hardware) -> bool:
        return sampling_ways(load, settings, devices, 1.0)[0].fits

    remedies = []
    engine, is_gpu = runtime.engine, hardware.device.gpu
    # The engine's settings first, which cost nothing.
    can_grow = is_gpu and engine.gpu_memory < LARGE_GPU_MEMORY
    if can_grow and fits(inference, _with_engine(runtime, gpu_memory=LARGE_GPU_MEMORY), hardware):
        remedies.append(f"--set runtime.engine.gpu_memory={LARGE_GPU_MEMORY:g}")
    if engine.name == "transformers" and fits(inference, _with_engine(runtime, name="vllm"), hardware):
        remedies.append("--set runtime.engine.name=vllm")
    for count in GPUS_OF_A_MACHINE:
        # The smallest number of devices that is enough, then the cheapest other card.
        wider = replace(hardware, per_node=count)
        if is_gpu and count > hardware.per_node and fits(inference, runtime, wider):
            remedies.append(f"--hardware {wider.label}")
            break
    for card in sorted(DEVICES.values(), key=lambda device: device.price or 0.0):
        replaced = replace(hardware, device=card)
        if card.name != hardware.device.name and fits(inference, runtime, replaced):
            remedies.append(f"--hardware {replaced.label}")
            break
    return remedies + [words for words, load in smaller.items() if fits(load, runtime, hardware)]


def _with_engine(runtime: Runtime, **fields: Any) -> Runtime:
    return runtime.model_copy(update={"engine": runtime.engine.model_copy(update=fields)})


def sampling_notes(inference: Inference, runtime: Runtime, hardware: Hardware, best: Way | None) -> list[str]:
    """Return what a reader should know about the numbers, one sentence each."""
    notes = list(inference.notes)
    layout = None if best is None else best.layout
    placement = layout.placement if isinstance(layout, EngineLayout) else "none"
    if placement == "external":
        notes.append("Servers that run already sample: their memory and time are not counted.")
    elif inference.sampling and runtime.engine.name == "auto" and not runtime.rollouts.pooled:
        notes.append(f"runtime.engine.name is auto, which means {local_engine(runtime)} on this machine.")
    uses_vllm = isinstance(layout, EngineLayout) and layout.engine == "vllm"
    if hardware.device.gpu and uses_vllm and placement not in ("external", "none"):
        notes.append(
            f"vLLM takes {runtime.engine.gpu_memory:g} of the card (gpu_memory) for engine and cache, needed or not."
        )
    if hardware.nodes > 1 and placement != "samplers" and inference.sampling:
        notes.append(
            f"Engines run on one of the {hardware.nodes} machines: runtime.executor.samplers or running servers "
            "(runtime.rollouts.addresses) use the others."
        )
    return notes
