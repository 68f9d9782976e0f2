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
from align.pipeline.pace import Pace
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.config.runtime import Runtime

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
    """Told of every point of the curves, as the event file is."""
    started: float = field(default_factory=time.time)
    auto_precision: Precision = "bfloat16"
    """Type that ``precision: auto`` stands for in this run. The stage's process measures it."""
    fail_at_once: Callable[[str], None] | None = None
    """Ends the stage's process, as failed and resumable, with a message: for what cannot be interrupted. None where
    ``run`` was called in a process that is not a stage's own."""
    pace: Pace = field(default_factory=Pace, repr=False)
    """Speed of the stage's work, from all reported progress."""
    _phase: _Phase = field(default_factory=lambda: _Phase(), repr=False)
    _reported_at: dict[str, float] = field(default_factory=dict, repr=False)
    """Time (``monotonic``) of the last reported progress of each unit."""

    @property
    def precision(self) -> Precision:
        """The type of the stage's matrix products, with ``auto`` resolved."""
        setting: PrecisionSetting = self.config.precision
        return self.auto_precision if setting == "auto" else setting

    def artifact(self, field_name: str) -> Artifact:
        """The artifact behind a required input field."""
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
        now, name = time.monotonic(), text.split()[0]
        if name == self._phase.name and now - self._phase.reported < PROGRESS_SECONDS:
            return
        self._phase.name, self._phase.reported = name, now
        self.emit("phase", text=text)

    def log(self, step: int, **metrics: float) -> None:
        """One point of the stage's curves, for the report."""
        self.emit("metrics", step=step, **metrics)
        for follower in self.followers:
            follower(step, metrics)

    def warn(self, message: str) -> None:
        """A warning the user sees on the console and in the report, without the passwords in its addresses."""
        self.emit("warning", message=redact(message))

    def note(self, message: str) -> None:
        """Show the user a line that is not a warning on the console and in the report, redacted like a warning."""
        self.emit("note", message=redact(message))
