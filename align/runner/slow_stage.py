"""Report within a minute that a stage is slow, if there is a reason that its user can remove. Torch-free.

A thread in the stage's process looks at the stage's progress. It warns at most twice: while the first step is still
running with what is certain by then, and later with the measured pace.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from align.models.compute_types import ProductSpeed
from align.pipeline.context import StageContext
from align.pipeline.pace import duration

FIRST_LOOK = 40.0
"""Seconds after the start of the stage's process before the first look; imports may take 20 of them."""
LOOK_EVERY = 5.0
LEAST_WINDOW = 15.0
"""Seconds of work from which a pace is told; less may be the warm-up of caches and kernels."""
LEAST_LEFT = 60.0
"""A stage that ends within this many seconds is not reported."""
BUSY, STARVED = 90.0, 0.5
"""Other processes take the cores if these are busy for this per cent, and the stage got less than this share."""
SWAPPED = 2**26
"""Bytes read back from swap between two looks that count as swapping."""


@dataclass
class Usage:
    """Counters of the process and the machine at one moment."""

    time: float
    cpu_seconds: float
    swapped_in: int

    @classmethod
    def now(cls) -> Usage:
        """Read the counters."""
        psutil.cpu_percent()  # the next call tells about the time since this one
        times = os.times()
        swapped_in = 0
        with contextlib.suppress(OSError, RuntimeError):  # a container may hide the counters
            swapped_in = psutil.swap_memory().sin
        return cls(time.monotonic(), times.user + times.system, swapped_in)


class SlowStageWatch:
    """Looks at one stage's progress and warns of a slow pace that has a cause."""

    def __init__(self, context: StageContext, speed: ProductSpeed | None, cores: int) -> None:
        """Watch the stage of ``context``; ``speed`` is its device's, ``cores`` are those that the process may use."""
        self.context = context
        self.speed = speed
        self.cores = cores
        self.usage = Usage.now()
        self._told_bound = self._told_pace = False

    def look(self, now: float) -> None:
        """Warn if the stage is slow for a reason; ``now`` is a time of ``time.time``."""
        pace = self.context.pace
        if pace.first is None or self._told_pace:
            return
        waited = now - pace.first["time"]
        left = pace.seconds_left()
        is_measured = left is not None and pace.seconds >= LEAST_WINDOW
        # Until the first unit is done, the time that it has taken so far is a lower bound.
        least_left = pace.units_left * waited
        if (left if is_measured else least_left) < LEAST_LEFT or (not is_measured and waited < LEAST_WINDOW):  # type: ignore[operator]
            return
        if not is_measured and (self._told_bound or pace.done > 0):
            return
        causes = self.causes()
        if not causes:
            return
        unit = str(pace.first.get("unit", "steps")).removesuffix("s")
        if is_measured and left is not None:
            self._told_pace = True
            text = f"{_rate(self.context)}, about {duration(left)} left"
        else:
            self._told_bound = True
            number = int(pace.first["done"]) + 1
            text = f"{unit} {number} has taken {duration(waited)} so far, so more than {duration(least_left)} are left"
        self.context.warn(f"{self.context.name}: {text}; {'; '.join(causes)}.")

    def causes(self) -> list[str]:
        """Return why the stage is slow, as far as one can tell; each is something that the user can change."""
        causes: list[str] = []
        if self.speed is not None and self.speed.emulates_bfloat16 and self.context.precision == "bfloat16":
            causes.append(f"this processor emulates bfloat16 ({self.speed.describe()}); set `precision: auto`")
        threads = int(os.environ.get("OMP_NUM_THREADS") or self.cores)
        if threads < self.cores:
            causes.append(f"it uses {threads} of {self.cores} cores (runtime.threads)")
        causes += self._contention(threads)
        torch = sys.modules.get("torch")
        if self.context.runtime.device == "cpu" and torch is not None and torch.cuda.is_available():
            causes.append("runtime.device is cpu although this machine has a GPU")
        return causes

    def _contention(self, threads: int) -> list[str]:
        """Return what other processes take from this one, since the look before."""
        before, busy = self.usage, psutil.cpu_percent()
        self.usage = after = Usage.now()
        seconds = max(after.time - before.time, 1e-3)
        share = (after.cpu_seconds - before.cpu_seconds) / (seconds * threads)
        causes = []
        if busy >= BUSY and share < STARVED:
            causes.append(f"other processes use the cores (this one got {share:.0%} of {threads})")
        if after.swapped_in - before.swapped_in > SWAPPED:
            causes.append("memory is swapped to disk")
        return causes


def _rate(context: StageContext) -> str:
    tokens = context.pace.tokens_per_second()
    if tokens is not None:
        return f"{tokens:.3g} tokens/s"
    unit = str((context.pace.last or {}).get("unit", "steps"))
    return f"{60 * (context.pace.units_per_second() or 0.0):.3g} {unit}/min"


@contextlib.contextmanager
def watch(context: StageContext, speed: ProductSpeed | None, cores: int) -> Iterator[None]:
    """Inside, a thread looks at the stage's progress every few seconds and warns as ``SlowStageWatch`` does."""
    watcher, ended = SlowStageWatch(context, speed, cores), threading.Event()

    def run() -> None:
        pause = FIRST_LOOK
        while not ended.wait(pause):
            pause = LOOK_EVERY
            watcher.look(time.time())

    thread = threading.Thread(target=run, name="slow-stage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
