"""The cheapest way to train a stage on given hardware, and remedies if none fits. Never imports torch.

The hardware is paid for as a whole, so the cheapest way is the fastest. The global batch is the config's on any number
of devices, so it must divide among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from align.capacity.hardware import DEVICES, GIB, Hardware
from align.capacity.job import Job, Setting
from align.capacity.layouts import Strategy, candidate_strategies, launch_of
from align.capacity.memory import Memory
from align.capacity.sharding import offloaded, sharded
from align.capacity.timing import training_time
from align.capacity.ways import Way, by_preference, largest_that_fits

MACHINE_FACTORS = (2, 4, 8, 16, 32, 64)
"""Factors of the number of machines that a remedy may ask for."""
MAX_MICRO_BATCH = 4096
"""Largest micro-batch that is tried."""
INDIVISIBLE = "does not divide"
"""Words of the obstacle of a batch that does not divide among the devices."""


def training_ways(
    job: Job, hardware: Hardware, rows: int | None, fill: float, requested: Strategy | None = None
) -> list[Way]:
    """Return every way to train, or only the ``requested`` one; those that fit first, the fastest at the head.

    ``rows`` is the number of rows trained on (no time if None), ``fill`` their mean length as a share of the greatest.
    """
    strategies = [requested] if requested else candidate_strategies(hardware.devices, job.checkpointing)
    ways = [training_way(job, hardware, strategy, rows, fill) for strategy in strategies]
    return sorted(ways, key=by_preference)


def training_way(job: Job, hardware: Hardware, strategy: Strategy, rows: int | None, fill: float) -> Way:
    """Return memory and time of one strategy, with the largest micro-batch that fits and divides a device's batch."""
    devices, device = hardware.devices, hardware.device
    if job.batch % devices:
        obstacle = f"the batch of {job.batch} {job.row} {INDIVISIBLE} among {devices} devices"
        return Way(strategy, 0, 0, device_parts(job, hardware, strategy, 1), obstacle=obstacle)
    device_batch = job.batch // devices
    largest = _largest(job, hardware, strategy)
    # The plan asks the stage itself what it refuses, such as 4 bits that FSDP2 cannot shard.
    objection = None if devices == 1 else job.objection(launch_of(strategy, hardware))
    if objection is not None:
        parts = device_parts(job, hardware, strategy, job.unit)
        return Way(strategy, 0, 0, parts, obstacle=objection.rstrip("."), is_refused=True)
    # Only micro-batches that fill a device's share exactly, as the stage itself requires.
    sizes = range(job.unit, min(device_batch, job.micro_batch) + 1, job.unit)
    divisors = [size for size in sizes if device_batch % size == 0]
    micro_batch = max((size for size in divisors if size <= largest), default=0)
    # The smallest at least, so that a way that does not fit shows how much it lacks.
    parts = device_parts(job, hardware, strategy, micro_batch or job.unit)
    host = _host_memory(job, hardware, strategy, micro_batch or job.unit)
    obstacle, usable = "", device.usable + device.context
    if not micro_batch:
        smallest = "one" if job.unit == 1 else str(job.unit)
        needed = sum(parts.values()) / GIB
        obstacle = f"{smallest} of the {job.row} needs {needed:.1f} GiB, usable are {usable / GIB:.1f}"
    elif host > device.host:
        obstacle = f"{host / GIB:.0f} GiB of the machine's memory for each device, of {device.host / GIB:.0f}"
    time = None
    if not obstacle and rows is not None:
        time = training_time(job, hardware, strategy, micro_batch, rows, fill=fill)
    return Way(strategy, micro_batch, largest, parts, time, obstacle, host_memory=host)


def device_parts(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> dict[str, int]:
    """Return the bytes of the fullest device with micro-batches of ``rows`` rows, by purpose."""
    memory = sharded(_process_memory(job, hardware, strategy, rows), job, strategy, hardware.devices)
    parts = memory.fullest(job.tokens(rows)) | {"context": hardware.device.context}
    return {name: amount for name, amount in parts.items() if amount}


def _host_memory(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> int:
    return offloaded(_process_memory(job, hardware, strategy, rows), job, strategy, hardware.devices)


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
    job: Job, hardware: Hardware, tried: Sequence[Way], smaller: Mapping[str, Job], requested: Strategy | None = None
) -> list[str]:
    """Return command-line options with which the stage fits; each was tried.

    They are more machines, another card, or one of ``smaller``: jobs that need less, by the option that asks for them.
    Where ``runtime.launch`` asks for a way, it also says on how many devices, and the first remedy is another launch.
    """
    if all(INDIVISIBLE in way.obstacle for way in tried):
        # No memory would help; the next larger batch that divides does.
        next_batch = -(-job.batch // hardware.devices) * hardware.devices
        return [f"{next_batch} {job.row} a step, which divide among {hardware.devices} devices"]
    smaller_fit = [words for words, smaller_job in smaller.items() if _fits(smaller_job, hardware, requested)]
    if requested is not None:
        best = training_ways(job, hardware, None, 1.0)[0]
        return [*([_launch_option(best, hardware)] if best.fits and hardware.devices > 1 else []), *smaller_fit]
    remedies = []
    # The fewest machines that are enough, then the cheapest other card.
    for factor in MACHINE_FACTORS:
        wider = replace(hardware, nodes=hardware.nodes * factor)
        if _fits(job, wider):
            remedies.append(f"--hardware {wider.label}")
            break
    for card in sorted(DEVICES.values(), key=lambda device: device.price or 0.0):
        if card.name != hardware.device.name and _fits(job, replace(hardware, device=card)):
            remedies.append(f"--hardware {replace(hardware, device=card).label}")
            break
    return remedies + smaller_fit


def _launch_option(way: Way, hardware: Hardware) -> str:
    assert isinstance(way.layout, Strategy)
    block = launch_of(way.layout, hardware).model_dump(exclude_unset=True)
    return f"--set runtime.launch='{json.dumps(block)}'"


def _fits(job: Job, hardware: Hardware, requested: Strategy | None = None) -> bool:
    # Without rows no time is computed, and whether a way fits does not depend on it.
    return any(way.fits for way in training_ways(job, hardware, None, 1.0, requested))
