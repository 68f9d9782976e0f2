"""The ways to train a stage on given hardware, and remedies if none fits. Never imports torch.

The global batch is the config's on any number of devices, so it must divide among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.capacity.hardware import GIB, Hardware, Way, largest_that_fits
from align.capacity.memory import Memory
from align.capacity.sharding import Job, Setting, Strategy, candidate_strategies, launch_of, offloaded, sharded

MACHINE_FACTORS = (2, 4, 8, 16, 32, 64)
"""Factors of the number of machines that a remedy may ask for."""
MAX_MICRO_BATCH = 4096
"""Largest micro-batch that is tried."""
INDIVISIBLE = "does not divide"
"""Words of the obstacle of a batch that does not divide among the devices."""


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
            "micro_batch_size": self.batch or None,
            "largest_micro_batch": self.largest or None,
            "host_memory": self.host_memory,
        }


def training_ways(job: Job, hardware: Hardware, requested: Strategy | None = None) -> list[TrainingWay]:
    """Return every way to train, or only the ``requested`` one.

    Ways that fit come first, the simplest at the head. Then come ways that only lack memory, the smallest first.
    """
    strategies = [requested] if requested else candidate_strategies(hardware.devices, job.checkpointing)
    ways = [training_way(job, hardware, strategy) for strategy in strategies]
    fitting = [way for way in ways if way.fits]
    others = [way for way in ways if not way.fits]
    return fitting + sorted(others, key=lambda way: (way.is_refused, way.peak))


def training_way(job: Job, hardware: Hardware, strategy: Strategy) -> TrainingWay:
    """Return the memory of one strategy, with the largest micro-batch that fits and divides a device's batch."""
    devices = hardware.devices
    if job.batch % devices:
        obstacle = f"the batch of {job.batch} {job.row} {INDIVISIBLE} among {devices} devices"
        return _impossible(strategy, device_parts(job, hardware, strategy, 1), obstacle)
    # The plan asks the stage itself what it refuses, such as 4 bits that FSDP2 cannot shard.
    objection = None if devices == 1 else job.objection(launch_of(strategy, hardware))
    if objection is not None:
        parts = device_parts(job, hardware, strategy, job.unit)
        return _impossible(strategy, parts, objection.rstrip("."), is_refused=True)
    largest = _largest(job, hardware, strategy)
    micro_batch = _micro_batch(job, job.batch // devices, largest)
    # A way that does not fit shows the smallest micro-batch, so a reader sees how much memory is missing.
    rows = micro_batch or job.unit
    parts = device_parts(job, hardware, strategy, rows)
    host = offloaded(_process_memory(job, hardware, strategy, rows), job, strategy, devices)
    return TrainingWay(
        label=strategy.label,
        strategy=strategy,
        batch=micro_batch,
        largest=largest,
        parts=parts,
        obstacle=_memory_obstacle(job, hardware, parts, host, bool(micro_batch)),
        host_memory=host,
    )


def _impossible(strategy: Strategy, parts: dict[str, int], obstacle: str, *, is_refused: bool = False) -> TrainingWay:
    """Return a way that no memory makes possible."""
    return TrainingWay(
        label=strategy.label,
        strategy=strategy,
        batch=0,
        largest=0,
        parts=parts,
        obstacle=obstacle,
        is_refused=is_refused,
    )


def _micro_batch(job: Job, device_batch: int, largest: int) -> int:
    """Return the rows of the largest micro-batch up to the config's that fits; 0 for none."""
    sizes = range(job.unit, min(device_batch, job.micro_batch) + 1, job.unit)
    # The stage itself requires that micro-batches fill a device's share exactly.
    divisors = [size for size in sizes if device_batch % size == 0]
    return max((size for size in divisors if size <= largest), default=0)


def _memory_obstacle(job: Job, hardware: Hardware, parts: Mapping[str, int], host: int, has_batch: bool) -> str:
    """Return which memory is too small; empty if both are large enough."""
    device = hardware.device
    if not has_batch:
        smallest = "one" if job.unit == 1 else str(job.unit)
        needed = sum(parts.values()) / GIB
        usable = (device.usable + device.context) / GIB
        return f"{smallest} of the {job.row} needs {needed:.1f} GiB, usable are {usable:.1f}"
    if host > device.host:
        return f"{host / GIB:.0f} GiB of the machine's memory for each device, of {device.host / GIB:.0f}"
    return ""


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
    )
    return job.memory(setting)


def _largest(job: Job, hardware: Hardware, strategy: Strategy) -> int:
    """Return the rows of the largest micro-batch that fits; 0 for none."""

    def fits(rows: int) -> bool:
        parts = device_parts(job, hardware, strategy, rows)
        return sum(parts.values()) - hardware.device.context <= hardware.device.usable

    return largest_that_fits(fits, MAX_MICRO_BATCH)


def training_remedies(
    job: Job,
    hardware: Hardware,
    tried: Sequence[TrainingWay],
    smaller: Mapping[str, Job],
    requested: Strategy | None = None,
) -> list[str]:
    """Return command-line options with which the stage fits; each was tried.

    They are more machines, another card, or an option of ``smaller``, whose values are jobs that need less.
    If ``runtime.launch`` asks for a strategy, it also sets the number of devices, so the first remedy is another
    launch.
    """
    if all(INDIVISIBLE in way.obstacle for way in tried):
        # No memory would help; the next larger batch that divides does.
        next_batch = -(-job.batch // hardware.devices) * hardware.devices
        return [f"{next_batch} {job.row} a step, which divide among {hardware.devices} devices"]
    smaller_fit = [words for words, smaller_job in smaller.items() if _fits(smaller_job, hardware, requested)]
    if requested is not None:
        return _launch_options(job, hardware) + smaller_fit
    # The fewest machines that are enough, then the smallest other card.
    wider = (replace(hardware, nodes=hardware.nodes * factor) for factor in MACHINE_FACTORS)
    remedies = []
    for candidates in (wider, hardware.other_cards()):
        enough = next((candidate for candidate in candidates if _fits(job, candidate)), None)
        if enough is not None:
            remedies.append(f"--hardware {enough.label}")
    return remedies + smaller_fit


def _launch_options(job: Job, hardware: Hardware) -> list[str]:
    """Return the option of the simplest launch on these devices that fits without another setting."""
    if hardware.devices == 1:
        return []
    for way in training_ways(job, hardware):
        if way.fits and way.strategy.checkpointing == job.checkpointing:
            block = launch_of(way.strategy, hardware).model_dump(exclude_unset=True)
            return [f"--set runtime.launch='{json.dumps(block)}'"]
    return []


def _fits(job: Job, hardware: Hardware, requested: Strategy | None = None) -> bool:
    return any(way.fits for way in training_ways(job, hardware, requested))
