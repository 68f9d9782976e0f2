"""Progress of a running stage, read from its event file while the file grows. Has no heavy imports."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.runner.listener import PARTS, REPORT_EVERY, RunningStage, silence
from align.runner.stage_result import WORK
from align.store.artifacts import EVENTS
from align.store.json_files import parse_event

MAX_BYTES = 4 * 2**20
"""Bytes at the end of an event file that are read at first; the pace then counts from there."""


@dataclass
class ProgressReader:
    """Reads what a stage's present attempt has reported, as the console shows it.

    ``folder`` is the stage's folder in progress. Every call of ``read`` reads only what is new.
    """

    folder: Path
    stage: RunningStage | None = None
    _inode: int = 0
    _offset: int = 0
    _attempt: float = field(default=0.0)
    """Start of the attempt: its work file is written then."""

    def read(self) -> RunningStage | None:
        """Return the stage's progress; None before it has reported anything."""
        try:
            started = (self.folder / WORK).stat().st_mtime
            with (self.folder / EVENTS).open("rb") as file:
                status = os.fstat(file.fileno())
                is_same = status.st_ino == self._inode and status.st_size >= self._offset and started == self._attempt
                if not is_same:
                    self._start_over(status, started)
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return self.stage
        # A line may be half written: the rest of it comes with the next call.
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._add(line)
        return self.stage

    def _start_over(self, status: os.stat_result, started: float) -> None:
        self.stage = None
        self._inode = status.st_ino
        self._attempt = started
        self._offset = max(0, status.st_size - MAX_BYTES)

    def _add(self, line: bytes) -> None:
        event = parse_event(line)
        # Earlier attempts wrote into the same file; a second allows for clocks of file systems.
        if event is None or event["time"] < self._attempt - 1:
            return
        if self.stage is None:
            self.stage = RunningStage(started=self._attempt)
        self.stage.heard = event["time"]
        if event["event"] == "progress":
            self.stage.pace.update(event)
            self.stage.phase = ""
        elif event["event"] == "phase":
            self.stage.phase = str(event["text"])


def progress_json(stage: RunningStage | None) -> dict[str, Any] | None:
    """Return a stage's progress as plain data: the text of the console, the share that is done, the time left."""
    if stage is None:
        return None
    event = stage.pace.last
    # In whole minutes, so a page that follows the stage changes once a minute.
    silent = (time.time() - stage.heard) // REPORT_EVERY * REPORT_EVERY
    values: dict[str, Any] = {"text": stage.status(), "phase": stage.phase, "share": None, "seconds_left": None}
    values["silence"] = silence(silent)
    if event is not None:
        values["reported"] = event["time"]
        values["share"] = min(1.0, event["done"] / event["total"]) if event["total"] > 0 else None
        # Parts are not alike, so the first parts do not tell about the others.
        if event.get("unit") != PARTS:
            values["seconds_left"] = stage.pace.seconds_left()
    return values
