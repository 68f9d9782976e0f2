"""Which way of working together is cheapest among those that fit, and what to change where none does. Never torch.

The hardware is paid for as a whole, so the cheapest way is the fastest. The global batch is the config's, whatever the
number of devices: what a device gets of it must come out even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from align.capacity.hardware import DEVICES, GIB, Hardware
from align.capacity.job import Job, Setting
from align.capacity.memory import Memory
from align.capacity.sharing import offloaded, shared
from align.capacity.strategies import Strategy, candidates
from align.capacity.timing import Estimated, estimate

MORE_MACHINES = (2, 4, 8, 16, 32, 64)
"""How many times the machines a remedy may ask for."""
MOST_ROWS = 4096
"""Largest micro-batch that is looked for."""


@dataclass(frozen=True)
class Option:
    """One way to run a stage."""

    strategy: Strategy
    micro_batch: int
    """Rows of a device's micro-batch; 0 where not even one fits."""
    largest: int
    """Rows of the largest micro-batch that would fit, whatever the batch size."""
    parts: dict[str, int]
    """Bytes of a device when it is fullest, by what they are for; with the smallest micro-batch where none fits."""
    host: int
    """Bytes of the machine's own memory for each device."""
    time: Estimated | None
    """None where it does not fit, or where the number of rows is not known."""
    why_not: str = ""
    """What stands against it; empty where it fits."""

    @property
    def label(self) -> str:
        """The strategy's."""
        return self.strategy.label

    @property
    def peak(self) -> int:
        """Bytes of a device, driver and libraries included."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Words, bytes and seconds."""
        return {
            "strategy": self.strategy.name,
            "zero_stage": self.strategy.zero_stage or None,
            "gradient_checkpointing": self.strategy.checkpointing,
            "offload": self.strategy.offload,
            "micro_batch_size": self.micro_batch or None,
            "largest_micro_batch": self.largest or None,
            "peak": self.peak,
            "parts": self.parts,
            "host_memory": self.host,
            "fits": not self.why_not,
            "why_not": self.why_not or None,
            "time": None if self.time is None else vars(self.time),
        }


def options(
    job: Job, hardware: Hardware, rows: int | None, share: float, given: Strategy | None = None
) -> list[Option]:
    """Every way, or the ``given`` one; those that fit come first, the fastest of them at the head."""
    ways = candidates(hardware.devices, job.checkpointing) if given is None else [given]
    found = [option(job, hardware, strategy, rows, share) for strategy in ways]
    return sorted(found, key=lambda one: (bool(one.why_not), one.time.seconds if one.time else one.peak))


def option(job: Job, hardware: Hardware, strategy: Strategy, rows: int | None, share: float) -> Option:
    """What one way costs."""
    devices, device = hardware.devices, hardware.device
    if job.batch % devices:
        why = f"the batch of {job.batch} {job.row} does not divide among {devices} devices"
        return Option(strategy, 0, 0, _parts(job, hardware, strategy, 1)[0], 0, None, why)
    local = job.batch // devices
    largest = _largest(job, hardware, strategy)
    wanted = [size for size in range(1, min(local, job.micro_batch) + 1) if local % size == 0]
    micro = max((size for size in wanted if size <= largest), default=0)
    memory, host = _parts(job, hardware, strategy, micro or 1)
    why, usable = "", device.usable + device.context
    if not micro:
        why = f"one of the {job.row} needs {sum(memory.values()) / GIB:.1f} GiB, usable are {usable / GIB:.1f}"
    elif host > device.host:
        why = f"{host / GIB:.0f} GiB of the machine's memory for each device, of {device.host / GIB:.0f}"
    time = None if why or rows is None else estimate(job, hardware, strategy, micro, rows, share)
    return Option(strategy, micro, largest, memory, host, time, why)


def _parts(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> tuple[dict[str, int], int]:
    memory, tokens = _memory(job, hardware, strategy, rows), job.tokens(rows)
    kept = shared(memory, job, strategy, hardware.devices).fullest(tokens)
    context = {"context": hardware.device.context}
    return {name: amount for name, amount in (kept | context).items() if amount}, offloaded(
        memory, job, strategy, hardware.devices
    )


def _memory(job: Job, hardware: Hardware, strategy: Strategy, rows: int) -> Memory:
    setting = Setting(
        rows,
        accumulated=job.batch > rows * hardware.devices,
        processes=hardware.devices,
        checkpointing=strategy.checkpointing,
        gpu=hardware.device.gpu,
    )
    return job.memory(setting)


def _largest(job: Job, hardware: Hardware, strategy: Strategy) -> int:
    """Rows of the largest micro-batch that fits; 0 for none. What a row needs only grows with their number."""

    def fits(rows: int) -> bool:
        parts = _parts(job, hardware, strategy, rows)[0]
        return sum(parts.values()) - hardware.device.context <= hardware.device.usable

    return greatest(fits, MOST_ROWS)


def greatest(fits: Callable[[int], bool], most: int) -> int:
    """The greatest number up to ``most`` that ``fits``, which those below it do as well; 0 for none."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, most)


def remedies(job: Job, hardware: Hardware, tried: list[Option], others: dict[str, Job]) -> list[str]:
    """What makes it fit, each tried out: more machines, another card, or one of ``others``.

    Those are jobs by the words of the command line that ask for them.
    """
    if all("does not divide" in one.why_not for one in tried):
        near = -(-job.batch // hardware.devices) * hardware.devices
        return [f"{near} {job.row} a step, which divide among {hardware.devices} devices"]
    found = []
    for more in MORE_MACHINES:
        wider = replace(hardware, nodes=hardware.nodes * more)
        if _fits(job, wider):
            found.append(f"--hardware {wider.label}")
            break
    for card in sorted(DEVICES.values(), key=lambda device: device.price or 0.0):
        if card.name != hardware.device.name and _fits(job, replace(hardware, device=card)):
            found.append(f"--hardware {replace(hardware, device=card).label}")
            break
    return found + [words for words, other in others.items() if _fits(other, hardware)]


def _fits(job: Job, hardware: Hardware) -> bool:
    return any(not one.why_not for one in options(job, hardware, None, 1.0))
