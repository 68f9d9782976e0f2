"""Strategies of training on several devices, what each device holds of a stage, and the ways in which a stage fits.

The global batch is the config's on any number of devices, so it must divide among them. Never imports torch.

The bytes are counted from what the frameworks document, with float32 weights and autocast, as ``align.training`` sets
them up:

- DDP has buckets as large as the gradients.
- FSDP2 gathers a layer's weights while it computes the layer, and the next layer's ahead. Weights outside the layers
  stay gathered for a step.
- DeepSpeed keeps a master copy of the weights with AdamW's averages and a bucket of gradients. At stage 3 it keeps as
  many gathered weights as its defaults allow.

Autocast's bfloat16 copies of gathered weights stay until their backward pass. Reward models and the rollout engine are
never sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from align.capacity.hardware import (
    GIB,
    OFFLOADED_PARTS,
    Device,
    Hardware,
    Strategy,
    Way,
    candidate_strategies,
    largest_that_fits,
    launch_of,
)
from align.capacity.memory import CACHED_SEQUENCES, Memory
from align.config.base import Precision
from align.config.runtime import HostPart
from align.config.runtime.launch import LaunchConfig
from align.config.tuning import TuningBase
from align.models.compute.architecture import Architecture
from align.models.compute.costs import FLOAT

BUCKET = 2 * 2**20 * 25
"""Bytes of exchange buffers of NCCL and the frameworks: two buckets of 25 MiB."""
ZERO_BUCKET = 5 * 10**8
"""Parameters of DeepSpeed's bucket, by its own default."""
ZERO_LIVE = 10**9
"""Parameters of the weights that DeepSpeed's stage 3 may keep gathered, by its own default."""
MAX_MICRO_BATCH = 4096
"""Largest micro-batch that is tried."""
GATHERED_AHEAD = 2
"""Layers whose full weights are in memory at a time."""


@dataclass(frozen=True)
class Setting:
    """Settings of a stage in one process."""

    rows: int
    """Rows of a micro-batch."""
    accumulated: bool = True
    """True if an optimizer step has several micro-batches."""
    processes: int = 1
    checkpointing: bool = False
    gpu: bool = False
    host: tuple[HostPart, ...] = ()
    """Parts in the machine's memory."""
    cached: int = CACHED_SEQUENCES
    """Most sequences for which the engine's cache has room, if it is vLLM's on a GPU."""


@dataclass(frozen=True)
class Job:
    """Load of a stage that trains: its model, its batches, and its memory in a setting."""

    model: Architecture
    tuning: TuningBase
    precision: Precision
    batch: int
    """Rows of an optimizer step, over all processes."""
    micro_batch: int
    """Rows of a micro-batch in the config."""
    row: str
    """Name of a row in the plural: ``rows``, ``pairs``, ``responses``."""
    tokens: Callable[[int], int]
    """Return the most tokens that so many rows have in memory."""
    memory: Callable[[Setting], Memory]
    """Return the bytes of one process in a setting."""
    objection: Callable[[LaunchConfig], str | None]
    """Return why the stage cannot run in such processes, whatever their micro-batches; None if it can."""
    unit: int = 1
    """Rows that no micro-batch separates."""
    trained: int = 0
    """Parameters with gradients, the critic's included."""
    gathered: int = 0
    """Parameters that sharding gathers for a micro-batch: the policy's, and a separate critic's."""
    checkpointing: bool = False
    """True if the config asks for gradient checkpointing."""
    host: tuple[HostPart, ...] | None = ()
    """Parts that the settings keep in the machine's memory; None if these are the plan's choice."""
    host_parts: tuple[HostPart, ...] = ()
    """Parts that the machine's memory can hold, in the order in which they go there."""
    engine_share: float | None = None
    """Share of a GPU that the settings give to vLLM in the stage's process; None without vLLM, and for ``auto``."""
    notes: tuple[str, ...] = ()


def sharded(memory: Memory, job: Job, strategy: Strategy, devices: int) -> Memory:
    """Return the memory of each of ``devices`` devices; ``memory`` describes a process without sharding."""
    if strategy.name in ("single", "ddp"):
        # Every device holds everything; DDP adds its buckets only.
        buckets = BUCKET + FLOAT * job.trained if devices > 1 else 0  # in addition to the gradients
        return replace(memory, buffers=buckets)
    is_deepspeed = strategy.name == "deepspeed"
    # The master copy has as many bytes as the gradients: float32, of what is trained
    optimizer = memory.optimizer + (memory.gradients if is_deepspeed else 0)
    critic_optimizer = memory.critic_state
    critic_weights = (memory.critic - critic_optimizer) // 2  # and as many bytes of gradients
    parts: dict[str, Any] = {
        "weights": _shard(memory.weights, strategy.shards_weights, devices),
        "gradients": _shard(memory.gradients, strategy.shards_gradients, devices),
        "optimizer": _shard(optimizer, strategy.shards_optimizer, devices),
        "reference": _shard(memory.reference, strategy.shards_weights, devices),
        "critic": _shard(critic_weights, strategy.shards_weights, devices)
        + _shard(critic_weights, strategy.shards_gradients, devices)
        + _shard(critic_optimizer, strategy.shards_optimizer, devices),
    }
    for name in OFFLOADED_PARTS[strategy.offload]:
        parts[name] = 0
    copies = memory.copies
    low_precision = job.precision == "bfloat16" and job.tuning.trains_all
    if is_deepspeed and strategy.checkpointing and low_precision:
        # DeepSpeed's own autocast keeps a copy of every matrix to the end of a pass.
        copies = max(copies, 2 * (job.model.matrices + job.model.experts))
    exchange = BUCKET if devices > 1 else 0
    return replace(memory, **parts, copies=copies, buffers=exchange + _gathered_bytes(job, strategy))


def offloaded(memory: Memory, job: Job, strategy: Strategy, devices: int) -> int:
    """Return the bytes that one device's shard needs of the machine's own memory."""
    on_device = sharded(memory, job, replace(strategy, offload="none"), devices)
    return sum(int(getattr(on_device, name)) for name in OFFLOADED_PARTS[strategy.offload])


def _host_bytes(memory: Memory, whole: Memory, tokens: int) -> int:
    """Return the bytes in the machine's memory of a process with ``memory``, which is ``whole`` without offloading."""
    activations = (whole.activations or 0) - (memory.activations or 0)
    resting = memory.base + memory.reference if memory.rests else 0
    return whole.optimizer - memory.optimizer + whole.critic - memory.critic + tokens * activations + resting


def _gathered_bytes(job: Job, strategy: Strategy) -> int:
    """Return the bytes of weights and gradients that are unsharded for a while."""
    if strategy.name == "deepspeed":
        bucket = FLOAT * min(ZERO_BUCKET, job.trained)
        live = FLOAT * min(ZERO_LIVE, job.gathered) if strategy.shards_weights else 0
        return bucket + live
    model = job.model
    # Devices gather these at once: some layers, the weights outside the layers, and the largest unit's gradient.
    root = model.embedded + (0 if model.tied else model.head)
    layer = model.largest.parameters
    gradients = max(layer, model.embedded) if job.tuning.trains_all else 0
    return FLOAT * (GATHERED_AHEAD * layer + root + gradients)


def _shard(amount: int, is_sharded: bool, devices: int) -> int:
    return -(-amount // devices) if is_sharded else amount


# ---- ways to train ----


@dataclass(frozen=True, kw_only=True)
class TrainingWay(Way):
    """One strategy with its micro-batch."""

    strategy: Strategy
    host_memory: int = 0
    """Bytes of the machine's own memory for each device, for what is offloaded."""
    is_refused: bool = False
    """True if the stage itself cannot run this way, whatever the memory."""

    def to_json(self) -> dict[str, Any]:
        """Return everything in words and bytes."""
        return super().to_json() | {
            "strategy": self.strategy.name,
            "zero_stage": self.strategy.zero_stage or None,
            "gradient_checkpointing": self.strategy.checkpointing,
            "offload": self.strategy.offload,
            "host": list(self.strategy.host),
            "micro_batch_size": self.batch or None,
            "largest_micro_batch": self.largest or None,
            "host_memory": self.host_memory,
        }


REACHED = 0.4
"""Share of a card's peak with which speeds are named; none was measured."""


def tokens_per_second(job: Job, way: TrainingWay, device: Device) -> float:
    """Return the tokens that a device learns from in a second if it reaches ``REACHED`` of its peak; 0 without a peak.

    A parameter needs 2 operations a token in the forward pass, 2 for the gradients of activations, 2 for its own
    gradient if it is trained, and 2 if the forward pass is computed again.
    """
    operations = 4 + 2 * job.tuning.trains_all + 2 * way.strategy.checkpointing
    return REACHED * 1e12 * device.teraflops / (operations * job.model.active)


def training_ways(job: Job, hardware: Hardware, requested: Strategy | None = None) -> list[TrainingWay]:
    """Return every way to train, or only the ``requested`` one.

    Ways that fit come first, the simplest at the head. Then come ways that only lack memory, the smallest first.
    """
    strategies = (
        [requested]
        if requested
        else candidate_strategies(hardware.devices, checkpointing=job.checkpointing, host=job.host or ())
    )
    ways = [training_way(job, hardware, strategy) for strategy in strategies]
    fitting = [way for way in ways if way.fits]
    if not fitting and not requested and hardware.devices == 1 and hardware.device.gpu:
        last = _last_resort(job, hardware)
        ways.append(last)
        fitting = [last] if last.fits else []
    others = [way for way in ways if not way.fits]
    return fitting + sorted(others, key=lambda way: (way.is_refused, way.peak))


def _last_resort(job: Job, hardware: Hardware) -> TrainingWay:
    """Return the way with the fewest parts in the machine's memory, or with all of them if that does not fit either.

    An engine's cache with room for only one sequence comes after all of them.
    """

    def offloading(parts: tuple[HostPart, ...], cached: int) -> TrainingWay:
        return training_way(job, hardware, Strategy("single", checkpointing=True, host=parts, cached=cached))

    choices = [job.host_parts[:count] for count in range(len(job.host_parts) + 1)] if job.host is None else [job.host]
    for cached in (CACHED_SEQUENCES, 1):
        fitting = next((parts for parts in choices if offloading(parts, cached).fits), None)
        if fitting is None:
            continue
        for part in fitting if job.host is None else ():
            # The last part made it fit, and maybe without the earlier ones.
            fewer = tuple(name for name in fitting if name != part)
            fitting = fewer if offloading(fewer, cached).fits else fitting
        return offloading(fitting, cached)
    return offloading(choices[-1], 1)


def training_way(job: Job, hardware: Hardware, strategy: Strategy) -> TrainingWay:
    """Return the memory of one strategy, with the largest micro-batch that fits and divides a device's batch."""
    devices = hardware.devices
    device = hardware.device
    way = TrainingWay(
        label=strategy.label,
        strategy=strategy,
        batch=0,
        largest=0,
        parts=device_parts(job, hardware, strategy, job.unit),
    )
    if job.batch % devices:
        return replace(way, obstacle=f"the batch of {job.batch} {job.row} does not divide among {devices} devices")
    # The plan asks the stage itself what it refuses, such as 4 bits that FSDP2 cannot shard.
    objection = None if devices == 1 else job.objection(launch_of(strategy, hardware))
    if objection is not None:
        return replace(way, obstacle=objection.rstrip("."), is_refused=True)

    def fits(rows: int) -> bool:
        parts = device_parts(job, hardware, strategy, rows)
        return sum(parts.values()) - device.context <= device.usable

    largest = largest_that_fits(fits, MAX_MICRO_BATCH)
    device_batch = job.batch // devices
    # The stage itself requires that micro-batches fill a device's share exactly.
    sizes = range(job.unit, min(device_batch, job.micro_batch, largest) + 1, job.unit)
    micro_batch = max((size for size in sizes if device_batch % size == 0), default=0)
    # A way that does not fit shows the smallest micro-batch, so a reader sees how much memory is missing.
    rows = micro_batch or job.unit
    parts = device_parts(job, hardware, strategy, rows)
    memory = _process_memory(job, hardware, strategy, rows)
    host = offloaded(memory, job, strategy, devices)
    if strategy.host:
        host = _host_bytes(memory, _process_memory(job, hardware, replace(strategy, host=()), rows), job.tokens(rows))
    obstacle = ""
    if not micro_batch:
        smallest = "one" if job.unit == 1 else str(job.unit)
        usable = (device.usable + device.context) / GIB
        needed = f"needs {sum(parts.values()) / GIB:.1f} GiB, usable are {usable:.1f}"
        obstacle = f"{smallest} of the {job.row} {needed}"
        if strategy.cached == 1 and parts.get("kv_cache"):
            obstacle = f"the cache of the engine has no room for one sequence: sampling {needed}"
    elif host > device.host:
        obstacle = f"{host / GIB:.0f} GiB of the machine's memory for each device, of {device.host / GIB:.0f}"
    obstacle = obstacle or _engine_shortage(job, hardware, strategy, rows)
    way = replace(way, batch=micro_batch, largest=largest, parts=parts, obstacle=obstacle, host_memory=host)
    if memory.activations is None:
        # Activations decide how many rows fit, so the largest micro-batch is not known.
        return replace(way, largest=0, not_counted=("activations",))
    return way


def _engine_shortage(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> str:
    """Return why vLLM's share of a GPU is too small for its weights and one sequence; empty if it is not."""
    device = hardware.device
    if job.engine_share is None or not device.gpu:
        return ""
    memory = _process_memory(job, hardware, replace(strategy, cached=1), rows)
    needed, room = memory.engine + memory.kv_cache + device.context, int(job.engine_share * device.memory)
    share = f"{room / GIB:.1f} (runtime.engine.gpu_memory {job.engine_share})"
    return f"one sequence needs {needed / GIB:.1f} GiB, the engine has {share}" if needed > room else ""


def beside_engine(job: Job, hardware: Hardware, way: TrainingWay) -> int:
    """Return the bytes of a device that the trainer holds while its engine is awake."""
    rows = max(way.batch, job.unit)
    memory = sharded(_process_memory(job, hardware, way.strategy, rows), job, way.strategy, hardware.devices)
    phases = memory.phases(job.tokens(rows))
    awake = [phases["sampling"]] if memory.released == "all" else phases.values()
    return max(sum(parts.values()) - parts.get("engine", 0) - parts.get("kv_cache", 0) for parts in awake)


def device_parts(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> dict[str, int]:
    """Return the bytes of the fullest device with micro-batches of ``rows`` rows, by purpose."""
    memory = sharded(_process_memory(job, hardware, strategy, rows), job, strategy, hardware.devices)
    parts = memory.fullest(job.tokens(rows)) | {"context": hardware.device.context}
    return {name: amount for name, amount in parts.items() if amount}


def _process_memory(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> Memory:
    """Return the memory of one process before sharding."""
    setting = Setting(
        rows,
        # Gradients outlive a micro-batch only if several make up a step.
        accumulated=job.batch > rows * hardware.devices,
        processes=hardware.devices,
        checkpointing=strategy.checkpointing,
        gpu=hardware.device.gpu,
        host=strategy.host,
        cached=strategy.cached,
    )
    return job.memory(setting)
