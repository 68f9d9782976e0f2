"""Speed of a stage's work, from its progress events. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def duration(seconds: float) -> str:
    """Return seconds as ``42s``, ``3m 05s`` or ``2h 10m``."""
    # Round first: 119.7 s are two minutes, not 1m 60s.
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    return f"{total // 3600}h {total % 3600 // 60:02d}m"


@dataclass
class Pace:
    """First and latest progress event of the current work; rates and the time left count from the first event.

    A resumed stage starts at its checkpoint. A stage that samples and then scores counts each work from zero in a
    separate unit. So the first event is the first event of this attempt in this unit.
    """

    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None

    def update(self, event: dict[str, Any]) -> None:
        """Take over a progress event."""
        last = self.last
        if last is None or event.get("unit") != last.get("unit") or event["done"] < last["done"]:
            self.first = event
        self.last = event

    @property
    def seconds(self) -> float:
        """Seconds between the two events."""
        return 0.0 if self.first is None or self.last is None else float(self.last["time"] - self.first["time"])

    @property
    def done(self) -> float:
        """Units between the two events."""
        return 0.0 if self.first is None or self.last is None else float(self.last["done"] - self.first["done"])

    @property
    def units_left(self) -> float:
        """Units after the latest event."""
        return 0.0 if self.last is None else float(self.last["total"] - self.last["done"])

    def seconds_left(self) -> float | None:
        """Return the seconds until all units are done at the pace so far; None without a pace."""
        if self.done <= 0 or self.seconds <= 0:
            return None
        return self.units_left * self.seconds / self.done

    def units_per_second(self) -> float | None:
        """Return the units per second; None without a pace."""
        return self.done / self.seconds if self.done > 0 and self.seconds > 0 else None

    def tokens_per_second(self) -> float | None:
        """Return the real tokens per second; None for work that counts no tokens."""
        if self.first is None or self.last is None or self.last.get("tokens") is None or self.seconds <= 0:
            return None
        return float(self.last["tokens"] - (self.first.get("tokens") or 0)) / self.seconds
