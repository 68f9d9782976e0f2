"""One way to run a stage on devices: whether it fits, what one device holds, time and cost. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.capacity.hardware import Hardware
from align.capacity.layouts import EngineLayout, Strategy
from align.capacity.timing import TimeEstimate


@dataclass(frozen=True)
class Way:
    """One way to run a stage, whether it trains or samples."""

    layout: Strategy | EngineLayout
    batch: int
    """Rows of a device's micro-batch, or sequences that each engine decodes at a time; 0 if not even one fits."""
    largest: int
    """The largest ``batch`` that would fit, whatever the config asks for."""
    parts: dict[str, int]
    """Bytes on the fullest device, by purpose; those of the smallest batch if none fits."""
    time: TimeEstimate | None = None
    """None if the way does not fit, or if the number of rows is not known."""
    obstacle: str = ""
    """Why the way does not fit; empty if it fits."""
    phase: str = ""
    """When the device is fullest: ``loading``, ``sampling``, ``scoring by …``, ``reading by …``; empty in training."""
    host_memory: int = 0
    """Bytes of the machine's own memory for each device, for what is offloaded."""
    wanted: int = 0
    """The ``batch`` that the settings ask for; 0 if they leave it open."""
    is_requested: bool = False
    """Whether the run's settings name this way, so that no other is tried."""
    is_refused: bool = False
    """Whether the stage itself cannot run this way, however much memory there is."""

    @property
    def fits(self) -> bool:
        """True if nothing stands against the way."""
        return not self.obstacle

    @property
    def label(self) -> str:
        """Name of the layout for the table."""
        return self.layout.label

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, driver and libraries included."""
        return sum(self.parts.values())

    def dollars(self, hardware: Hardware) -> tuple[float, float, float] | None:
        """Return the cost in US dollars: lowest, assumed, highest; None without a time or a price.

        All of the hardware is paid for, however many devices the stage uses.
        """
        price = hardware.device.price
        if self.time is None or price is None:
            return None
        # All devices are paid for while the stage runs, used or not.
        hourly = hardware.devices * price
        low, seconds, high = self.time.fastest, self.time.seconds, self.time.slowest
        return low / 3600 * hourly, seconds / 3600 * hourly, high / 3600 * hourly

    def to_json(self) -> dict[str, Any]:
        """Return everything in words, bytes and seconds."""
        return {
            "way": self.label,
            **self.layout.to_json(self.batch, self.largest),
            "peak": self.peak,
            "parts": self.parts,
            "fullest_while": self.phase or None,
            "host_memory": self.host_memory,
            "fits": self.fits,
            "why_not": self.obstacle or None,
            "time": None if self.time is None else self.time.to_json(),
        }


def by_preference(way: Way) -> tuple[bool, bool, float]:
    """Sort key: ways that fit first, the fastest of them first; then the smallest that only lacks memory."""
    return not way.fits, way.is_refused, way.time.seconds if way.time else way.peak


def largest_that_fits(fits: Callable[[int], bool], maximum: int) -> int:
    """Return the greatest number up to ``maximum`` for which ``fits`` holds; 0 for none.

    ``fits`` must be monotone: if it holds for a number, it holds for every smaller one.
    """
    if not fits(1):
        return 0
    # double until it no longer fits, then bisect: low always fits, high does not
    low, high = 1, 2
    while high <= maximum and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return min(low, maximum)
