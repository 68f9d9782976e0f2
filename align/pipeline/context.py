"""The context that a stage's run gets: config, inputs, folders, and the report of progress. Torch-free."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.base import Precision, PrecisionSetting
from align.config.user_paths import user_path
from align.errors import redact
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.config.runtime import Runtime


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
        """Add a progress event."""
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


PROGRESS_SECONDS = 0.2
"""Least time between two reports of a count."""
STEPS = ("steps", "updates", "parts")
"""Units of which every report is kept: each has its own loss, score or name."""


@dataclass
class _Phase:
    """The phase that was reported last, and the time (``monotonic``) of the report."""

    name: str = ""
    reported: float = 0.0


@dataclass(frozen=True)
class MemoryGuess:
    """The plan's choice for the memory of a stage that trains, before a step has measured it."""

    micro_batch: int
    """Rows or responses of a micro-batch in a process."""
    recomputes: bool
    """True if activations are recomputed in the backward pass."""


@dataclass(frozen=True)
class StageContext:
    """Everything that ``run(context)`` gets.

    ``inputs`` maps each input field of the config to its artifact, or to a list of them, or None.
    ``output`` is the folder that becomes the artifact; ``checkpoints`` is kept between attempts and dropped
    when the artifact is published. ``seed`` is derived from the pipeline's seed.
    """

    name: str
    config: Any
    inputs: dict[str, Any]
    seed: int
    runtime: Runtime
    output: Path
    checkpoints: Path
    events: Path
    cache: Path | None = None
    """Folder of the store that stages share as a cache: results do not depend on its files, which may be deleted. None
    if ``run`` was called without a store."""
    pipeline: str = ""
    """Name of the pipeline."""
    kind: str = ""
    """Kind of the stage, or the import path of its record if the kind is not align's (``registry.find_stage``)."""
    group: str = ""
    """Short digest of all its stages' keys: one run of a pipeline, however often it was killed and resumed."""
    followers: list[Callable[[int, dict[str, float]], None]] = field(default_factory=list)
    """Functions that get every point of the curves, as the event file does."""
    started: float = field(default_factory=time.time)
    auto_precision: Precision = "bfloat16"
    """Type that ``precision: auto`` stands for in this run. The stage's process measures it."""
    guess: MemoryGuess | None = None
    """None for a stage that does not train, and for a model whose memory has no rule."""
    fail_at_once: Callable[[str], None] | None = None
    """Ends the stage's process, as failed and resumable, with a message: for what cannot be interrupted. None if
    ``run`` was called in another process than a stage's."""
    pace: Pace = field(default_factory=Pace, repr=False)
    """Speed of the stage's work, from all reported progress."""
    _phase: _Phase = field(default_factory=_Phase, repr=False)
    _reported_at: dict[str, float] = field(default_factory=dict, repr=False)
    """Time (``monotonic``) of the last reported progress of each unit."""

    @property
    def precision(self) -> Precision:
        """The type of the stage's matrix products, with ``auto`` resolved."""
        setting: PrecisionSetting = self.config.precision
        return self.auto_precision if setting == "auto" else setting

    def artifact(self, field_name: str) -> Artifact:
        """Return the artifact of a required input field."""
        value = self.inputs[field_name]
        assert isinstance(value, Artifact), f"{field_name} is not a single artifact"
        return value

    def shared_answers(self, subfolder: str = "") -> Path | None:
        """Return the folder of models' answers that runs share: ``subfolder`` of ``cache``, or the user's own folder.

        A stage's field ``cache`` names one, or is False for none. Also None without a store.
        """
        place = getattr(self.config, "cache", True)
        if isinstance(place, str):
            return user_path(place, Path.cwd())
        return self.cache / subfolder if place and self.cache is not None else None

    def emit(self, kind: str, **values: Any) -> None:
        """Append one event to the stage's event file, which the console and the report read."""
        line = json.dumps({"event": kind, "time": time.time(), **values}, default=float)
        # The file is opened and closed for each event, so a kill loses at most one line.
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def progress(self, done: float, total: float, unit: str = "steps", tokens: int | None = None, **shown: Any) -> None:
        """Report ``done`` of ``total`` units, the real ``tokens`` so far, and values to show (loss, score).

        A count is skipped within ``PROGRESS_SECONDS`` of the previous report, unless all units are done.
        """
        self.pace.update({"done": done, "total": total, "unit": unit, "tokens": tokens, "time": time.time()})
        now = time.monotonic()
        # An engine may answer hundreds of times a second, and each report is a line in a file.
        is_due = now - self._reported_at.get(unit, -PROGRESS_SECONDS) >= PROGRESS_SECONDS
        if not is_due and done < total and unit not in STEPS:
            return
        self._reported_at[unit] = now
        self.emit("progress", done=done, total=total, unit=unit, tokens=tokens, **shown)

    def phase(self, text: str) -> None:
        """Name what the stage does now, such as ``starting vLLM`` or ``sampling 32/64``, for work without progress.

        Counts of one phase are reported as rarely as progress is.
        """
        now = time.monotonic()
        name = text.split()[0]
        if name == self._phase.name and now - self._phase.reported < PROGRESS_SECONDS:
            return
        self._phase.name = name
        self._phase.reported = now
        self.emit("phase", text=text)

    def log(self, step: int, **metrics: float) -> None:
        """Log one point of the stage's curves, for the report."""
        self.emit("metrics", step=step, **metrics)
        for follower in self.followers:
            follower(step, metrics)

    def warn(self, message: str) -> None:
        """Show the user a warning on the console and in the report, without the passwords in its addresses."""
        self.emit("warning", message=redact(message))

    def note(self, message: str) -> None:
        """Show the user a line as ``warn`` does that is not a warning."""
        self.emit("note", message=redact(message))
