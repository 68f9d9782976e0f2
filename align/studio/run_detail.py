"""One run as its page shows it: stages, graph, progress, alarms, curves, logs, settings.

The run page (``align.report``) has the same numbers: the same series, panels, boxes and health. Files that have not
changed are not read again, and a file that grows is read again only within a share of the time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.report.page.curve_panels import curve_numbers
from align.report.page.metric_series import Events, read_events
from align.report.run import stage_costs
from align.report.run.training_health import raised_alarms, training_health
from align.report.scorecard.scorecard_tables import as_yaml
from align.runner.listener import RunningStage
from align.runs.progress import ProgressReader, progress_json
from align.runs.resume import console_path
from align.runs.run_page import RunOutline
from align.runs.status import StageStatus
from align.store.artifacts import CHECKPOINTS, EVENTS, GENERATORS, LOG, Artifact
from align.store.json_files import read_tail
from align.store.record import RECORD
from align.store.rollouts import ROLLOUTS, read_settings
from align.store.store import Store
from align.studio.context import NotFound
from align.studio.run_index import IndexedRun, Signature, file_signature

MAX_FILES = 64
"""Event files whose series are kept in memory."""
MAX_STAGES = 2000
"""Finished stages whose numbers are kept in memory."""
COSTS = ("time", "memory", "tokens", "speed", "device", "created")
SHARE_OF_TIME = 0.05
"""Largest share of the time that goes into reading a file that grows."""
LOG_BYTES = 40_000
MAX_WARNINGS = 50
BOXES = {"done": "done", "runs": "running", "failed": "failed", "damaged": "failed", "stopped": "failed"}
"""State of a stage → look of its box in the graph; other states are pending."""


@dataclass
class EventCache:
    """Series of event files by folder; a changed file is read again once it is due."""

    _entries: OrderedDict[Path, tuple[Any, float, Events]] = field(default_factory=OrderedDict)
    """Folder → signature, time from which it may be read again, and content; the last used comes last."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, folder: Path) -> Events:
        """Return the events of a stage's folder."""
        signature = file_signature(folder / EVENTS)
        now = time.monotonic()
        with self._lock:
            known, due, events = self._entries.get(folder, (None, 0.0, Events()))
            if folder in self._entries and (known == signature or now < due):
                self._entries.move_to_end(folder)
                return events
            events = read_events(folder)
            ended = time.monotonic()
            self._entries[folder] = signature, ended + (ended - now) / SHARE_OF_TIME, events
            while len(self._entries) > MAX_FILES:
                self._entries.popitem(last=False)
            return events


@dataclass(frozen=True)
class FinishedStage:
    """Numbers of a finished stage for the table, and its box for the graph."""

    cost: dict[str, str]
    box: dict[str, Any]
    can_chat: bool
    """True for a checkpoint that the view ``chat`` can load."""


@dataclass
class RunReader:
    """Reads runs for their pages. ``events``, ``progress`` and ``finished`` remember what was read before."""

    store: Store
    events: EventCache = field(default_factory=EventCache)
    progress: OrderedDict[Path, ProgressReader] = field(default_factory=OrderedDict)
    finished: OrderedDict[tuple[str, str, str], tuple[Signature | None, FinishedStage]] = field(
        default_factory=OrderedDict
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def folder(self, run: RunOutline, stage: str, state: str) -> Path | None:
        """Return the folder with the files of a stage; None if it has not begun."""
        if stage not in run.stages:
            raise NotFound(f"The run '{run.name}' has no stage '{stage[:80]}'.")
        kind, key = run.stages[stage]
        folder = self.store.folder(kind, key) if state == "done" else self.store.partial(kind, key)
        return folder if folder.is_dir() else None

    def read(self, run: IndexedRun, states: list[StageStatus]) -> dict[str, Any]:
        """Return everything that changes while the run continues; curves and logs have a version instead."""
        outline = run.outline
        stages = [self._stage(outline, status) for status in states]
        description = outline.pipeline.get("description")
        return {
            "name": outline.name,
            "title": run.title,
            "description": description if isinstance(description, str) else "",
            "when": run.when,
            "stages": stages,
            "graph": self._graph(outline, states, stages),
            "health": self._health(outline, states),
            "console": file_signature(console_path(self.store, outline.name)),
        }

    def _stage(self, run: RunOutline, status: StageStatus) -> dict[str, Any]:
        """Return a stage's state, cost, progress, warnings and alarms."""
        kind, key = run.stages[status.stage]
        folder = self.folder(run, status.stage, status.state)
        events = Events() if folder is None else self.events.read(folder)
        stage = {
            **status.to_json(),
            "kind": kind,
            "key": key[:12],
            "inputs": run.inputs(status.stage),
            "warnings": events.warnings[-MAX_WARNINGS:],
            "alarms": raised_alarms(events.warnings),
            "notes": events.notes[-MAX_WARNINGS:],
            "has_rollouts": folder is not None and _rollout_folder(folder, status.state).is_dir(),
            "has_curves": any(len(steps) > 1 for steps, _ in events.series.values()),
            "events": None if folder is None else file_signature(folder / EVENTS),
            "log": None if folder is None else file_signature(folder / LOG),
            "progress": None,
            "cost": None,
            "can_chat": False,
        }
        if status.state == "runs" and folder is not None:
            stage["progress"] = progress_json(self._progress(folder))
        finished = self._finished(run, status) if status.state == "done" else None
        if finished is not None:
            stage["cost"] = finished.cost
            stage["can_chat"] = finished.can_chat
        return stage

    def _progress(self, folder: Path) -> RunningStage | None:
        with self._lock:
            reader = self.progress.setdefault(folder, ProgressReader(folder))
            self.progress.move_to_end(folder)
            while len(self.progress) > MAX_FILES:
                self.progress.popitem(last=False)
            return reader.read()

    def _finished(self, run: RunOutline, status: StageStatus) -> FinishedStage | None:
        """Return the cost and the box of a finished stage, read once while its record is the same file."""
        kind, key = run.stages[status.stage]
        signature = file_signature(self.store.folder(kind, key) / RECORD)
        place = (kind, key, status.stage)
        with self._lock:
            known, finished = self.finished.get(place, (None, None))
            if known is not None and known == signature:
                return finished
        artifact = self._artifact(run, status)
        if artifact is None:
            return None
        row = stage_costs.stage_row(artifact, Events())
        finished = FinishedStage(
            cost={name: row[name] for name in COSTS},
            box=stage_costs.finished_box(artifact, cached=False),
            can_chat=artifact.kind in GENERATORS and (artifact.model / "config.json").is_file(),
        )
        with self._lock:
            self.finished[place] = signature, finished
            while len(self.finished) > MAX_STAGES:
                self.finished.popitem(last=False)
        return finished

    def _artifact(self, run: RunOutline, status: StageStatus) -> Artifact | None:
        kind, key = run.stages[status.stage]
        return self.store.find_intact(kind, key, status.stage) if status.state == "done" else None

    def _graph(self, run: RunOutline, states: list[StageStatus], stages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return boxes and arrows with coordinates, as the diagram of the run page."""
        boxes = {}
        for status, stage in zip(states, stages, strict=True):
            finished = self._finished(run, status) if status.state == "done" else None
            if finished is not None:
                boxes[status.stage] = dict(finished.box)
                continue
            lines = [status.state]
            progress = stage["progress"]
            if progress is not None:
                lines = [part.strip() for part in (progress["text"] or progress["phase"]).split("·")[:2]]
            boxes[status.stage] = stage_costs.stage_box(status.stage, BOXES.get(status.state, "pending"), *lines)
        return stage_costs.place_boxes(boxes, {status.stage: run.inputs(status.stage) for status in states})

    def _health(self, run: RunOutline, states: list[StageStatus]) -> dict[str, Any] | None:
        """Return the table of training health: columns with healthy ranges, a row for each stage."""
        by_stage: dict[str, Events] = {}
        for status in states:
            folder = self.folder(run, status.stage, status.state)
            if folder is not None:
                by_stage[status.stage] = self.events.read(folder)
        health = training_health(by_stage)
        if health is None:
            return None
        columns = [{"title": measure.title, "healthy": measure.healthy} for measure in health["columns"]]
        return {"columns": columns, "rows": health["rows"]}

    def curves(self, run: RunOutline, stage: str, state: str) -> dict[str, Any]:
        """Return the panels of a stage as numbers, and ``steps_per_update``, which leads to the rollouts of a step."""
        folder = self.folder(run, stage, state)
        if folder is None:
            return curve_numbers(Events()) | {"steps_per_update": 1}
        settings: dict[str, Any] = {}
        # The view of rollouts says what is wrong with their files.
        with contextlib.suppress(UserError):
            settings = read_settings(_rollout_folder(folder, state))
        steps = int(settings.get("num_epochs", 1)) * int(settings.get("num_mini_batches", 1))
        return curve_numbers(self.events.read(folder)) | {"steps_per_update": steps}

    def log(self, run: RunOutline, stage: str, state: str) -> dict[str, Any]:
        """Return the end of a stage's log."""
        folder = self.folder(run, stage, state)
        return {"path": "", "text": ""} if folder is None else tail_json(folder / LOG)

    def settings(self, run: RunOutline, status: StageStatus) -> dict[str, Any]:
        """Return the settings, numbers and provenance of a finished stage, or the settings of another stage."""
        artifact = self._artifact(run, status)
        if artifact is None:
            block = (run.pipeline.get("stages") or {}).get(status.stage) or {}
            return {"config": as_yaml(block), "facts": [], "metrics": []}
        row = stage_costs.stage_row(artifact, Events())
        return {name: row[name] for name in ("config", "facts", "metrics")}


def _rollout_folder(folder: Path, state: str) -> Path:
    """Return the folder with the rollouts of a stage: its artifact's, or that next to its checkpoints."""
    return (folder if state == "done" else folder / CHECKPOINTS) / ROLLOUTS


def tail_json(path: Path, size: int = LOG_BYTES) -> dict[str, Any]:
    """Return the end of a text file, and its path; without a file the text is empty."""
    try:
        data = read_tail(path, size)
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return {"path": str(path), "text": data.decode("utf-8", "replace"), "is_cut": len(data) == size}


def find_status(states: list[StageStatus], run: str, stage: str) -> StageStatus:
    """Return the state of a stage of a run. Raises ``NotFound`` for another name."""
    for status in states:
        if status.stage == stage:
            return status
    raise NotFound(f"The run '{run}' has no stage '{stage[:80]}'.")
