"""Follows stages that a cluster makes as a local run is followed: starts, events, ends, told to a listener.

What a stage came to is read from the store, why it did not from what its job said, and from the cluster's queue where
the job could say nothing. Ending this process ends no job of a queue that lives without it. Never imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from align.errors import StageFailed
from align.pipeline.pipeline import Node, Pipeline
from align.runner.listener import Listener
from align.runner.runner import Run
from align.runner.subprocess import Tail
from align.store.artifacts import Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.partial import CHECKPOINTS, EVENTS, LOG
from align.store.store import Store

POLL_SECONDS = 0.5
LATE_SECONDS = 60.0
"""How long a shared file system may take to show what a job has written."""
SILENT_SECONDS = 1800.0
"""How long a queue may be silent before following ends."""


class NoAnswer(Exception):
    """The cluster's queue did not answer, or not with what was asked for."""


@dataclass(frozen=True)
class Said:
    """How a job's last turn ended: ``done``, ``failed``, ``refused``, or ``stopped`` to go on in another turn."""

    status: str
    message: str
    turn: int = 0
    """How often the job had been queued again before."""
    log: str | None = None
    node: str = ""
    """The cluster's own name of the machine, where it has one."""


def write_note(path: Path, said: Said) -> None:
    """Write how a job is into a file that others read meanwhile."""
    write_sealed(path, asdict(said))


def read_note(path: Path) -> Said | None:
    """The note of a job; None where there is none or it is damaged: the job then counts as silent."""
    try:
        return Said(**read_sealed(path, _Note).model_dump())
    except (FileNotFoundError, DamagedFile):
        return None


class _Note(BaseModel):
    """The content of a job's note."""

    model_config = ConfigDict(strict=True, extra="forbid")

    status: str
    message: str
    turn: int = 0
    log: str | None = None
    node: str = ""


@dataclass(frozen=True)
class Place:
    """Where a stage is in the queue, ``how`` in words; ``gone``: over, it may be with an artifact not yet seen."""

    state: Literal["waits", "runs", "over", "gone"]
    how: str
    remedy: str = ""


class Queue(Protocol):
    """What a cluster says of a run's stages."""

    name: str
    every: float
    """Seconds between two questions."""

    def look(self, stages: Collection[str]) -> dict[str, Place]:
        """Where these stages are; raises ``NoAnswer``."""

    def said(self, stage: str) -> Said | None:
        """What the stage's job said of its last turn, if one has ended."""

    def log(self, stage: str) -> Path:
        """What the stage's job itself prints."""

    def replaces(self, stage: str) -> str | None:
        """The time of the artifact that the stage is made anew for; None where any will do."""


@dataclass
class _Followed:
    """A stage whose job is not over."""

    node: Node
    tail: Tail | None = None
    place: Place | None = None
    gone: float | None = None
    turn: int = -1
    """The last turn of its job whose end was told of."""


class Following:
    """Follows ``stages`` of ``pipeline``; ``run`` is what it has come to."""

    def __init__(
        self, pipeline: Pipeline, store: Store, stages: Collection[str], queue: Queue, listener: Listener
    ) -> None:
        self.pipeline, self.store, self.queue, self.listener = pipeline, store, queue, listener
        self.run = Run(self.store, last={name: pipeline.resolve(name) for name in pipeline.expanded.rounds})
        self.left = {name: _Followed(pipeline.nodes[name]) for name in stages}
        self.failures: dict[str, str] = {}
        self.places: dict[str, Place] = {}
        self.asked, self.answered = float("-inf"), time.monotonic()

    def follow(self) -> Run:
        """Until no job is left; raises ``StageFailed`` then if a stage has failed."""
        for node in self.pipeline:
            found = self.store.find_intact(node.stage.kind, node.key, node.name)
            if node.name not in self.left and found is not None:
                self.run.artifacts[node.name] = found
                self.listener.stage_cached(node, found)
        while self.left:
            self._ask()
            for one in list(self.left.values()):
                self._look_at(one)
            if self.left:
                time.sleep(POLL_SECONDS)
        if self.failures:
            raise StageFailed("\n".join(self.failures.values()))
        return self.run

    def _ask(self) -> None:
        """Ask the queue how its jobs are, every so often."""
        if time.monotonic() - self.asked < self.queue.every:
            return
        self.asked = time.monotonic()
        try:
            self.places = self.queue.look(self.left)
            self.answered = time.monotonic()
        except NoAnswer as error:
            if time.monotonic() - self.answered > SILENT_SECONDS:
                raise StageFailed(
                    f"{self.queue.name} has not answered for {SILENT_SECONDS / 60:.0f} min ({error}). Its jobs go on "
                    "without being followed; the same command follows them again."
                ) from None

    def _look_at(self, one: _Followed) -> None:
        node, name = one.node, one.node.name
        if one.tail is not None:
            for event in one.tail.read():
                self.listener.stage_event(node, event)
        found = self.store.find_intact(node.stage.kind, node.key, name)
        if found is not None and found.record["created"] != self.queue.replaces(name):
            self._done(one, found)
            return
        place = self.places.get(name, Place("gone", "its job is gone, and nothing of it is there"))
        said = self.queue.said(name)
        if said is not None and said.status in ("failed", "refused"):
            self._failed(one, f"stage '{name}' failed: {said.message}", said.log)
        elif place.state in ("waits", "runs"):
            if said is not None and said.status == "stopped" and said.turn > one.turn:
                one.turn, one.tail = said.turn, None
                note = f"{said.message} Its job is queued again."
                self.listener.stage_event(node, {"event": "note", "message": note})
            self._alive(one, place)
        elif self.answered >= self.asked:
            self._gone(one, place, said)

    def _alive(self, one: _Followed, place: Place) -> None:
        one.gone = None
        if one.place != place:
            one.place = place
            self.listener.stage_queued(one.node, place.how)
        if place.state == "waits":
            one.tail = None
            return
        partial = self.store.partial(one.node.stage.kind, one.node.key)
        if one.tail is None and partial.is_dir():
            one.tail = Tail(partial / EVENTS)
            self.listener.stage_started(one.node, partial, any((partial / CHECKPOINTS).glob("*")))

    def _done(self, one: _Followed, found: Artifact) -> None:
        name = one.node.name
        self.run.artifacts[name] = found
        self.run.ran.append(name)
        del self.left[name]
        self.listener.stage_done(one.node, found)

    def _gone(self, one: _Followed, place: Place, said: Said | None) -> None:
        """The job is over, and there is no artifact: that may be late."""
        one.gone = one.gone or time.monotonic()
        # What a failed job says may be late, too; and what waited for it is cancelled in the same moment.
        if time.monotonic() - one.gone < (LATE_SECONDS if place.state == "gone" else 2 * self.queue.every):
            return
        name = one.node.name
        failed = next((other for other in one.node.input_names if other in self.failures), None)
        if failed is not None:
            self._failed(one, f"stage '{name}' was not begun: it reads '{failed}', which failed.", None)
            return
        remedy = place.remedy
        if not remedy and not self.queue.log(name).exists():
            remedy = f"It left no log: does the machine it ran on see {self.store.root}?"
        parts = [f"stage '{name}' failed: {place.how}.", remedy]
        parts.append("" if said is None else f"Its turn before ended so: {said.message}")
        parts.append("Run again to go on from what is there.")
        self._failed(one, " ".join(filter(None, parts)), None)

    def _failed(self, one: _Followed, message: str, log: str | None) -> None:
        """``log`` is what the job named; else the stage's own, else the job's."""
        name = one.node.name
        known = [Path(log)] if log else []
        known += [self.store.partial(one.node.stage.kind, one.node.key) / LOG, self.queue.log(name)]
        found = next((path for path in known if path.exists()), known[-1])
        self.failures[name] = f"{message}\nLog: {found}" if found.exists() else message
        del self.left[name]
        self.listener.stage_failed(one.node, message, found)


__all__ = ["Following", "NoAnswer", "Place", "Queue", "Said", "read_note", "write_note"]
