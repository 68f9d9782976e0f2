"""Follow the stages that a cluster runs, and adjust a pipeline to the machine of a job. Never imports torch.

A listener hears of the stages as it does in a local run. A stage's result is read from the store, its failure from the
note of its job, or from the cluster's queue if the job could not write one. Ending this process ends no job of a queue
that lives without it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import RootModel

from align.config.runtime.executor import RayExecutor, SlurmExecutor
from align.errors import StageFailed
from align.pipeline.pipeline import Node, Pipeline
from align.runner.listener import Listener
from align.runner.runner import Run
from align.runner.stage_process import Tail
from align.store.artifacts import CHECKPOINTS, EVENTS, LOG, Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.store import Store

Executor = TypeVar("Executor", SlurmExecutor, RayExecutor)

POLL_SECONDS = 0.5
LATE_SECONDS = 60.0
"""Time that a shared file system may need to show what a job has written."""
SILENT_SECONDS = 1800.0
"""Time that a queue may be silent before following ends."""


class SchedulerError(Exception):
    """The cluster's queue did not answer, or refused."""


@dataclass(frozen=True)
class JobResult:
    """End of a job's last turn: ``done``, ``failed``, ``refused``, or ``stopped`` to continue in another turn."""

    status: str
    message: str
    turn: int = 0
    """Times that the job had been requeued before."""
    log: str | None = None
    node: str = ""
    """The cluster's own name of the machine, if it has one."""


def write_note(path: Path, result: JobResult) -> None:
    """Write a job's result into a file that others read meanwhile."""
    write_sealed(path, asdict(result))


def read_note(path: Path) -> JobResult | None:
    """Return a job's result; None if there is no note or it is damaged: the job then counts as silent."""
    try:
        return read_sealed(path, RootModel[JobResult]).root
    except (FileNotFoundError, DamagedFile):
        return None


@dataclass(frozen=True)
class JobState:
    """State of a stage's job in the queue.

    ``gone`` is a job that is over, perhaps with an artifact that this machine does not see yet.
    """

    state: Literal["waits", "runs", "over", "gone"]
    description: str
    remedy: str = ""


class Queue(Protocol):
    """The jobs of one run in a cluster."""

    name: str
    every: float
    """Seconds between two queries."""

    def query(self, stages: Collection[str]) -> dict[str, JobState]:
        """Return the states of these stages' jobs. Raises ``SchedulerError``."""

    def result(self, stage: str) -> JobResult | None:
        """Return the result of the job's last turn; None if no turn has ended."""

    def log(self, stage: str) -> Path:
        """Return the file that the job itself prints to."""

    def replaces(self, stage: str) -> str | None:
        """Return the creation time of the artifact that a forced stage replaces; None where any artifact will do."""


@dataclass
class _Followed:
    """A stage whose job is not over."""

    node: Node
    tail: Tail | None = None
    state: JobState | None = None
    gone_since: float | None = None
    turn: int = -1
    """The last turn of its job whose end was reported."""


class JobFollower:
    """Follows ``stages`` of ``pipeline``; ``run`` holds the artifacts so far."""

    def __init__(
        self, pipeline: Pipeline, store: Store, stages: Collection[str], queue: Queue, listener: Listener
    ) -> None:
        self.pipeline = pipeline
        self.store = store
        self.queue = queue
        self.listener = listener
        self.run = Run(self.store, last={name: pipeline.resolve(name) for name in pipeline.expanded.rounds})
        self.remaining = {name: _Followed(pipeline.nodes[name]) for name in stages}
        self.failures: dict[str, str] = {}
        self.states: dict[str, JobState] = {}
        self.last_query = float("-inf")
        self.last_answer = time.monotonic()

    def follow(self) -> Run:
        """Follow until no job is left. Raises ``StageFailed`` then if a stage has failed."""
        for node in self.pipeline:
            # A stage that was finished before the run has no job to follow.
            artifact = self.store.find_intact(node.stage.kind, node.key, node.name)
            if node.name not in self.remaining and artifact is not None:
                self.run.artifacts[node.name] = artifact
                self.listener.stage_cached(node, artifact)
        while self.remaining:
            self._query()
            for followed in list(self.remaining.values()):
                self._update(followed)
            if self.remaining:
                time.sleep(POLL_SECONDS)
        if self.failures:
            raise StageFailed("\n".join(self.failures.values()))
        return self.run

    def _query(self) -> None:
        """Query the queue, at most once in ``queue.every`` seconds."""
        # The store is read twice a second; a scheduler that many share is asked less often.
        if time.monotonic() - self.last_query < self.queue.every:
            return
        self.last_query = time.monotonic()
        try:
            self.states = self.queue.query(self.remaining)
            self.last_answer = time.monotonic()
        except SchedulerError as error:
            if time.monotonic() - self.last_answer > SILENT_SECONDS:
                raise StageFailed(
                    f"{self.queue.name} has not answered for {SILENT_SECONDS / 60:.0f} min ({error}). Its jobs "
                    "continue without being followed; the same command follows them again."
                ) from None

    def _update(self, followed: _Followed) -> None:
        """Look at one stage: its events, its artifact, its job's note, its job's state, in this order of trust."""
        node = followed.node
        name = followed.node.name
        if followed.tail is not None:
            for event in followed.tail.read():
                self.listener.stage_event(node, event)
        # 1. An artifact settles it, whatever the queue says. A forced stage needs another artifact than it replaces.
        artifact = self.store.find_intact(node.stage.kind, node.key, name)
        if artifact is not None and artifact.record["created"] != self.queue.replaces(name):
            self._on_done(followed, artifact)
            return
        # 2. The job's own word about a failure.
        state = self.states.get(name, JobState("gone", "its job is gone and has left no artifact"))
        result = self.queue.result(name)
        if result is not None and result.status in ("failed", "refused"):
            self._on_failed(followed, f"stage '{name}' failed: {result.message}", result.log)
        # 3. The queue's word.
        elif state.state in ("waits", "runs"):
            if result is not None and result.status == "stopped" and result.turn > followed.turn:
                # Each turn's end is reported once.
                followed.turn = result.turn
                followed.tail = None
                note = f"{result.message} Its job is requeued."
                self.listener.stage_event(node, {"event": "note", "message": note})
            self._on_alive(followed, state)
        elif self.last_answer >= self.last_query:  # the cached answer may be older than the end of the job
            self._on_gone(followed, state, result)

    def _on_alive(self, followed: _Followed, state: JobState) -> None:
        followed.gone_since = None
        if followed.state != state:
            followed.state = state
            self.listener.stage_queued(followed.node, state.description)
        # A job that ran and waits again was requeued. Its next turn is followed as a new start.
        if state.state == "waits":
            followed.tail = None
            return
        partial = self.store.partial(followed.node.stage.kind, followed.node.key)
        if followed.tail is None and partial.is_dir():
            followed.tail = Tail(partial / EVENTS)
            is_resumed = any((partial / CHECKPOINTS).glob("*"))
            self.listener.stage_started(followed.node, partial, is_resumed)

    def _on_done(self, followed: _Followed, artifact: Artifact) -> None:
        name = followed.node.name
        self.run.artifacts[name] = artifact
        self.run.ran.append(name)
        del self.remaining[name]
        self.listener.stage_done(followed.node, artifact)

    def _on_gone(self, followed: _Followed, state: JobState, result: JobResult | None) -> None:
        """Report a job that is over without an artifact as failed, after a wait: both may arrive late."""
        followed.gone_since = followed.gone_since or time.monotonic()
        # A failed job's note may also be late, and jobs that waited for it are cancelled in the same moment.
        patience = LATE_SECONDS if state.state == "gone" else 2 * self.queue.every
        if time.monotonic() - followed.gone_since < patience:
            return
        name = followed.node.name
        failed_input = next((stage for stage in followed.node.input_names if stage in self.failures), None)
        # Its own job never ran, so its own log explains no failure.
        if failed_input is not None:
            self._on_failed(followed, f"stage '{name}' did not start: its input '{failed_input}' failed.", None)
            return
        remedy = state.remedy
        if not remedy and not self.queue.log(name).exists():
            remedy = f"It left no log: does the machine it ran on see {self.store.root}?"
        parts = [f"stage '{name}' failed: {state.description}.", remedy]
        if result is not None:
            parts.append(f"Its previous turn ended with: {result.message}")
        parts.append("Run again to continue from what is there.")
        self._on_failed(followed, " ".join(filter(None, parts)), None)

    def _on_failed(self, followed: _Followed, message: str, log: str | None) -> None:
        """Report a failure with the log that the job named, else the stage's, else the job's."""
        name = followed.node.name
        # From the most specific log to the least.
        candidates = [Path(log)] if log else []
        partial = self.store.partial(followed.node.stage.kind, followed.node.key)
        candidates += [partial / LOG, self.queue.log(name)]
        path = next((path for path in candidates if path.exists()), candidates[-1])
        self.failures[name] = f"{message}\nLog: {path}" if path.exists() else message
        del self.remaining[name]
        self.listener.stage_failed(followed.node, message, path)


# ---- a job's machine ----


def executor_settings(pipeline: Pipeline, executor: type[Executor], stage: str | None = None) -> Executor:
    """Return what a stage, or a worker of a sweep, asks of ``executor``; the defaults in a run on another executor."""
    runtime = pipeline.config.runtime if stage is None else pipeline.runtimes[stage]
    return runtime.executor if isinstance(runtime.executor, executor) else executor()


def with_threads(pipeline: Pipeline, cores: int | None) -> Pipeline:
    """Return the pipeline with a job's ``cores`` as threads of each stage's processes, unless it sets threads itself.

    If ``runtime.launch.processes`` is ``auto``, the stage's machine decides.
    """
    if pipeline.config.runtime.threads is not None or not cores:
        return pipeline
    runtime = copy.deepcopy(dict(pipeline.raw.get("runtime") or {}))
    blocks: dict[str, dict[str, Any]] = runtime.setdefault("stages", {})
    for node in pipeline:
        processes = pipeline.runtimes[node.name].launch.processes if node.stage.distributed else 1
        # A stage of a loop may have only the loop's block.
        short = pipeline.expanded.without_round(node.name)
        name = short if short in blocks and node.name not in blocks else node.name
        block = blocks.setdefault(name, {})
        if processes != "auto" and block.get("threads") is None:
            block["threads"] = max(1, cores // processes)
    # ``runtime`` is not part of a key, so the stages are still those that were submitted.
    return Pipeline({**pipeline.raw, "runtime": runtime}, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def await_inputs(pipeline: Pipeline, node: Node, store: Store, seconds: float = 60.0) -> None:
    """Wait for a stage's inputs: a shared file system may show late what another machine has just written."""
    inputs = [pipeline.nodes[name] for name in node.input_names]
    # Past the deadline no error is raised here: the run itself names the inputs that are missing.
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(store.find_intact(source.stage.kind, source.key) is not None for source in inputs):
            return
        time.sleep(0.5)
