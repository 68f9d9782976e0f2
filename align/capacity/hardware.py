"""Devices with their memory, the notation ``4x8xh100``, and one way to fit a stage on them. Never imports torch.

The memory of a card is the memory that torch reports on it, which is less than its name says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.process_limits import usable_memory

GIB = 2**30
CPU = re.compile(r"cpu(-(?P<gib>[1-9]\d{0,4}))?")
NOTATION = re.compile(r"((?P<first>[1-9]\d{0,3})x)?((?P<second>[1-9]\d{0,3})x)?(?P<name>[a-z][a-z0-9-]*|\d{4}|\d{2}gb)")


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine's processor."""

    name: str
    memory: int
    """Bytes available to programs."""
    context: int = int(0.7 * GIB)
    """Bytes that the driver and the libraries need before any tensor."""
    host: int = 200 * GIB
    """Bytes of the machine's own memory for each device."""
    gpu: bool = True

    @property
    def usable(self) -> int:
        """Bytes for tensors; 5 % of the memory stays free for fragmentation."""
        return int(0.95 * self.memory) - self.context


GIB_OF_CARDS = {
    "b200": 178.4,
    "h200": 139.8,
    "h100": 79.1,
    "a100-80": 79.2,
    "a100-40": 39.4,
    "l40s": 44.5,
    "l4": 22.0,
    "a10g": 22.0,
    "rtx4090": 23.5,
    "rtx3090": 23.6,
    "rtx4080": 15.7,
}
DEVICES = {name: Device(name, int(gib * GIB)) for name, gib in GIB_OF_CARDS.items()}
"""Cards by their name in ``--hardware``."""
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "4080": "rtx4080", "h100-80": "h100"}
ALIASES |= {"16gb": "rtx4080", "24gb": "rtx4090", "40gb": "a100-40", "80gb": "h100"}
"""Other names; ``24gb`` stands for a common card of that size."""


@dataclass(frozen=True)
class Hardware:
    """``nodes`` machines with ``per_node`` devices each."""

    device: Device
    nodes: int = 1
    per_node: int = 1

    @property
    def devices(self) -> int:
        """Number of devices on all machines."""
        return self.nodes * self.per_node

    @property
    def label(self) -> str:
        """Notation of the hardware, such as ``4x8xh100``."""
        if self.nodes > 1:
            return f"{self.nodes}x{self.per_node}x{self.device.name}"
        if self.per_node > 1:
            return f"{self.per_node}x{self.device.name}"
        return self.device.name

    def other_cards(self) -> list[Hardware]:
        """Return the same number of each other card, the smallest card first."""
        cards = sorted(DEVICES.values(), key=lambda device: device.memory)
        return [replace(self, device=card) for card in cards if card.name != self.device.name]


def parse_hardware(text: str) -> Hardware:
    """Parse ``cpu``, ``1xa100-40``, ``8xh100`` or ``4x8xh100`` (machines, devices of each); ``cpu-64`` has 64 GiB.

    Raises ``UserError`` for any other text.
    """
    match = NOTATION.fullmatch(text.strip().lower())
    name = match["name"] if match else text
    processor = CPU.fullmatch(name)
    device = _processor(processor["gib"]) if processor else DEVICES.get(ALIASES.get(name, name))
    if match is None or device is None:
        raise UserError(
            f"--hardware {text}: expected a number of devices and their name, such as 8xh100, 1xa100-40, cpu, or "
            f"4x8xh100 for four machines of eight.{suggest(name, [*DEVICES, *ALIASES, 'cpu'])}"
        )
    first = int(match["first"] or 1)
    second = match["second"]
    # ``8xh100`` is one machine with eight devices, ``4x8xh100`` four such machines.
    nodes, per_node = (first, int(second)) if second else (1, first)
    if not device.gpu:
        # Processes on one processor share its memory, which cards do not.
        share = device.memory // per_node
        device = replace(device, memory=share, host=share)
    return Hardware(device, nodes, per_node)


def _processor(gib: str | None) -> Device:
    """Return this machine's processor; ``gib`` replaces the machine's memory."""
    memory = int(gib) * GIB if gib else usable_memory()
    name = "cpu" if gib is None else f"cpu-{gib}"
    return Device(name, memory, context=int(0.8 * GIB), host=memory, gpu=False)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a stage on devices, with the bytes of the fullest device."""

    label: str
    """Name for the table."""
    batch: int
    """Rows of a device's micro-batch, or sequences that an engine decodes at a time; 0 if not even one fits."""
    largest: int
    """The largest ``batch`` that would fit, whatever the config asks for."""
    parts: dict[str, int]
    """Bytes on the fullest device, by purpose; for the smallest batch if none fits."""
    obstacle: str = ""
    """Reason if the way does not fit; empty if it fits."""
    not_counted: tuple[str, ...] = ()
    """Parts without a rule, which are missing in ``parts``; ``largest`` is 0 then."""

    @property
    def fits(self) -> bool:
        """True if no obstacle was found."""
        return not self.obstacle

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, driver and libraries included."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return everything in words and bytes."""
        return {
            "way": self.label,
            "peak": self.peak,
            "parts": self.parts,
            "fits": self.fits,
            "why_not": self.obstacle or None,
            "not_counted": list(self.not_counted),
        }


def largest_that_fits(fits: Callable[[int], bool], maximum: int) -> int:
    """Return the greatest number up to ``maximum`` for which ``fits`` holds; 0 for none.

    ``fits`` must be monotone: if it holds for a number, it holds for every smaller one.
    """
    if not fits(1):
        return 0
    # Double until it no longer fits, then bisect: low always fits, high does not.
    low = 1
    high = 2
    while high <= maximum and fits(high):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return min(low, maximum)
