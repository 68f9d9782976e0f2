"""The type of a stage's matrix products, and the warning about a slow stage. Never imports torch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel

from align.config.base import Precision
from align.config.runtime import Runtime
from align.config.runtime.launch import world_size
from align.config.stages.continue_from import CONTINUE
from align.models.compute.costs import ProductSpeed, read_speed
from align.pipeline.context import StageContext, duration
from align.pipeline.pipeline import Pipeline
from align.pipeline.registry import load_object
from align.store.artifacts import Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed

if TYPE_CHECKING:
    from align.runner.plan import Step

PRECISION_FILE = "precision.json"
"""In the stage's partial folder: the type of its first attempt."""
MEASUREMENT = "align.models.compute.precision:product_speed"
DEVICE = "align.models.compute.processes:device_of"
BROADCAST = "align.models.compute.processes:broadcast"
"""Functions that are loaded by name, because their modules import torch."""


class StagePrecision(BaseModel):
    """The content of ``precision.json``."""

    precision: Precision


def choose_precision(folder: Path, config: Any, inputs: Mapping[str, Any], runtime: Runtime) -> Precision:
    """Return the type that ``precision: auto`` stands for in the stage of ``folder``.

    In several processes the first process chooses, and all of them must call this.
    """
    if getattr(config, "precision", None) != "auto":
        return "bfloat16"  # not used: the config says the type, or the stage has no products

    def choose() -> Precision:
        first_attempt = _read(folder)
        if first_attempt is not None:
            return first_attempt
        # Results differ between the types. A later attempt, and a stage that continues another, keep the first choice,
        # also on a machine whose other type is faster.
        precision = _precision_of(inputs.get(CONTINUE)) or measured_speed(runtime).faster
        write_sealed(folder / PRECISION_FILE, {"precision": precision})
        return precision

    precision: Precision = load_object(BROADCAST)(choose) if world_size() > 1 else choose()
    return precision


def measured_speed(runtime: Runtime) -> ProductSpeed:
    """Return the speed of products on the stage's device; torch is imported if it was not measured before."""
    speed = read_speed() if runtime.device == "cpu" else None
    return speed or load_object(MEASUREMENT)(load_object(DEVICE)(runtime))


def emulation_warning(speed: ProductSpeed) -> str:
    """Return what ``precision: bfloat16`` costs on a device that emulates it."""
    return (
        f"this processor emulates bfloat16 ({speed.describe()}): products take "
        f"{speed.float32 / speed.bfloat16:.0f} times as long. Set `precision: auto`"
    )


def plan_notes(pipeline: Pipeline, steps: Sequence[Step]) -> list[str]:
    """Return what ``precision`` means on this machine for the stages that a run would make."""
    planned = [step.node for step in steps if step.action in ("run", "resume")]
    on_cpu = [node for node in planned if not _uses_gpu(pipeline.runtimes[node.name])]
    settings = {node.name: getattr(node.config, "precision", None) for node in on_cpu}
    notes = []
    speed = read_speed()
    if "auto" in settings.values():
        if speed is None:
            notes.append("precision auto: this processor is measured when the first stage starts")
        else:
            notes.append(f"precision auto: {speed.faster} on this processor ({speed.describe()})")
    emulated = [name for name, setting in settings.items() if setting == "bfloat16"]
    if emulated and speed is not None and speed.emulates_bfloat16:
        notes.append(f"! {', '.join(emulated)}: {emulation_warning(speed)}.")
    return notes


def _uses_gpu(runtime: Runtime) -> bool:
    """Return True if the stage will run on a GPU, as far as one can tell without torch."""
    return runtime.device == "cuda" or (runtime.device == "auto" and Path("/dev/nvidiactl").exists())


def _read(folder: Path) -> Precision | None:
    try:
        return read_sealed(folder / PRECISION_FILE, StagePrecision).precision
    except (FileNotFoundError, DamagedFile):
        return None


def _precision_of(continued: Any) -> Precision | None:
    """Return the type that a finished stage computed in; None for older records and for no stage."""
    precision = continued.record.get("precision") if isinstance(continued, Artifact) else None
    return precision if precision in ("bfloat16", "float32") else None


FIRST_LOOK = 40.0
"""Seconds after the start of the stage's process before the first look; imports may last 20 of them."""
LOOK_EVERY = 5.0
LEAST_WINDOW = 15.0
"""Seconds of work from which a pace is told; less may be the warm-up of caches and kernels."""
LEAST_LEFT = 60.0
"""A stage that ends within this many seconds is not reported."""
BUSY = 90.0
STARVED = 0.5
"""Other processes occupy the cores if these are busy for this per cent, and the stage got less than this share."""
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
        psutil.cpu_percent()  # the next call tells about the time since this call
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
        seconds_left = pace.seconds_left()
        is_measured = seconds_left is not None and pace.seconds >= LEAST_WINDOW
        # Until the first unit is done, the time so far is a lower bound.
        least_left = pace.units_left * waited
        if (seconds_left if is_measured else least_left) < LEAST_LEFT or (not is_measured and waited < LEAST_WINDOW):  # type: ignore[operator]
            return
        # The lower bound is reported once. After the first unit the pace itself is measured soon.
        if not is_measured and (self._told_bound or pace.done > 0):
            return
        causes = self.causes()
        if not causes:
            return
        unit = str(pace.first.get("unit", "steps")).removesuffix("s")
        if is_measured and seconds_left is not None:
            self._told_pace = True
            text = f"{_rate(self.context)}, about {duration(seconds_left)} left"
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
        """Return how much other processes have used since the last look."""
        before = self.usage
        busy = psutil.cpu_percent()
        self.usage = after = Usage.now()
        seconds = max(after.time - before.time, 1e-3)
        share = (after.cpu_seconds - before.cpu_seconds) / (seconds * threads)
        causes = []
        # Busy cores are no proof of contention, because the stage may be the process that keeps them busy.
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
    watcher = SlowStageWatch(context, speed, cores)
    ended = threading.Event()

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
