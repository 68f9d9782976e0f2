"""A run's stages as Ray tasks: one each, which gets the results of the tasks of its inputs. Never imports torch.

A task writes its node, and how it ended, into a file of the store, which every node must see.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.clusters.follow import (
    JobFollower,
    JobResult,
    JobState,
    await_inputs,
    executor_settings,
    read_note,
    with_threads,
    write_note,
)
from align.config.runtime.executor import RayExecutor
from align.config.user_functions import add_module_folders, module_folders
from align.errors import StageFailed, UserError
from align.inference import ray_client
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest, request_stop
from align.runner.listener import Listener
from align.runner.open_store import Opening
from align.runner.runner import Prepared, Run, run_pipeline
from align.store.artifacts import LOG
from align.store.record import MARKER
from align.store.store import JOBS, Store


@dataclass(frozen=True)
class StageTask:
    """Arguments of a task, as plain values that any machine can read."""

    raw: dict[str, Any]
    """The pipeline as parsed YAML, overrides set and loops written out."""
    where: str
    base: str
    rounds: dict[str, list[str]]
    store: dict[str, Any]
    """Fields of ``align.runner.open_store.Opening``."""
    folder: str
    """Folder of the tasks' notes."""
    stage: str
    key: str
    force: bool = False
    """True when the stage runs although an artifact is there, the one created at ``replaces``."""
    replaces: str | None = None
    cores: int = 1
    module_folders: list[str] = field(default_factory=list)
    """Folders of the pipeline's files, whose modules it may name."""

    def write_note(self, result: JobResult) -> None:
        """Write the task's state into its note."""
        write_note(Path(self.folder) / f"{self.stage}.json", result)


def run_stage_task(fields: dict[str, Any], *input_statuses: str) -> str:
    """Run one stage, as a Ray task; return ``done`` or another status.

    ``fields`` are a ``StageTask``'s. ``input_statuses`` are the results of the tasks of its inputs: as arguments, they
    make Ray wait for those tasks.
    """
    # A failed stage is an ordinary result to Ray, so this task starts all the same and has to look.
    if any(status != "done" for status in input_statuses):
        return "skipped"
    task = StageTask(**fields)
    host = socket.gethostname()
    folder = Path(task.store["folder"])
    if not (folder / MARKER).is_file():
        return f"failed: node {host} does not see the store {folder}; all nodes must, under the same path."
    task.write_note(JobResult("runs", host, node=ray_client.current_node()))
    result = _run_stage(task)
    task.write_note(result)
    return result.status


def _run_stage(task: StageTask) -> JobResult:
    log: Path | None = None
    try:
        _enter(task.base)
        add_module_folders(task.module_folders)
        store = Opening(**task.store).open()
        pipeline = Pipeline(task.raw, task.where, Path(task.base), task.rounds)
        pipeline = with_threads(pipeline, max(1, task.cores))
        node = pipeline.nodes[task.stage]
        # Refuse to publish under another key than the run waits for.
        if node.key != task.key:
            raise UserError(
                f"stage '{task.stage}' has another key here than where the run started: a file that {task.where} "
                "names differs. All nodes must see the same files."
            )
        log = store.partial(node.stage.kind, node.key) / LOG
        await_inputs(pipeline, node, store)
        # A forced stage whose node died is tried again: if the first try was published, it is done.
        artifact = store.find_intact(node.stage.kind, node.key)
        is_forced = task.force and (artifact is None or artifact.record["created"] == task.replaces)
        run_pipeline(
            pipeline,
            store=store,
            only=node.name,
            rebuild=(node.name,) if is_forced else (),
            listener=Listener(),
            # It gets no signal: ``RayQueue._stop`` leaves its request in the stage's folder instead.
            stop=StopRequest(),
        )
    except Stopped as stopped:
        return JobResult("stopped", str(stopped).removeprefix(f"stage '{task.stage}' "))
    except (UserError, StageFailed) as error:
        text = str(error).partition("\nLog: ")[0]
        message = text.removeprefix(f"stage '{task.stage}' failed: ").removeprefix(f"stage '{task.stage}': ")
        status = "refused" if isinstance(error, UserError) else "failed"
        return JobResult(status, message, log=str(log) if log is not None and log.is_file() else None)
    return JobResult("done", "")


def _enter(folder: str) -> None:
    """Change to the command's working folder: relative paths in the pipeline start there.

    Raises ``UserError`` if this node does not see it.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"node {socket.gethostname()} does not see the folder {folder} ({error.strerror}); all nodes must, under "
            "the same path."
        ) from None


@dataclass
class RayQueue:
    """The tasks of a run, as a :class:`~align.clusters.follow.Queue`."""

    ray: Any
    pipeline: Pipeline
    store: Store
    folder: Path
    references: dict[str, Any] = field(default_factory=dict)
    """Stage → Ray's reference to its task."""
    name: str = "Ray"
    every: float = 0.5
    stop: StopRequest = field(default_factory=StopRequest)
    """Asks running stages to save and stop, and keeps others from starting."""
    _replaces: dict[str, str] = field(default_factory=dict)
    _unplaced_since: dict[str, float] = field(default_factory=dict)
    """Stage → monotonic time since when no node could ever hold its task."""
    _cancelled: dict[str, JobState] = field(default_factory=dict)
    """Stages cancelled here, with the reason; Ray only says of their tasks that they were cancelled."""

    def start(self, nodes: Iterable[Node], force: set[str]) -> None:
        """Start a task for each of these stages, in the pipeline's order."""
        rounds = {name: list(names) for name, names in self.pipeline.expanded.rounds.items()}
        for node in nodes:
            block = executor_settings(self.pipeline, RayExecutor, node.name)
            artifact = self.store.find_intact(node.stage.kind, node.key)
            if node.name in force and artifact is not None:
                self._replaces[node.name] = str(artifact.record["created"])
            task = StageTask(
                raw=self.pipeline.plain,
                where=self.pipeline.where,
                base=str(self.pipeline.base.resolve()),
                rounds=rounds,
                store=asdict(Opening.of(self.store)),
                folder=str(self.folder.resolve()),
                stage=node.name,
                key=node.key,
                force=node.name in force,
                replaces=self._replaces.get(node.name),
                cores=int(block.cpus),
                module_folders=module_folders(),
            )
            # Ray starts the task when these have ended.
            inputs = [self.references[name] for name in node.input_names if name in self.references]
            name = f"align:{self.pipeline.name}:{node.name}"
            self.references[node.name] = ray_client.start(
                self.ray, run_stage_task, block, name, [asdict(task), *inputs]
            )

    def query(self, stages: Collection[str]) -> dict[str, JobState]:
        """Return the states of these stages' tasks; after a request to stop, pass it on to them."""
        states = {stage: self._state(stage, stages) for stage in stages}
        if self.stop.is_requested:
            for stage, state in states.items():
                self._stop(stage, state)
        return states

    def _stop(self, stage: str, state: JobState) -> None:
        """Have a running stage save and stop, and cancel a stage that waits."""
        node = self.pipeline.nodes[stage]
        partial = self.store.partial(node.stage.kind, node.key)
        if state.state == "runs" and partial.is_dir():
            request_stop(partial)
        elif state.state == "waits":
            ray_client.cancel(self.ray, [self.references[stage]])

    def _state(self, stage: str, remaining: Collection[str]) -> JobState:
        if stage in self._cancelled:
            return self._cancelled[stage]
        outcome = ray_client.outcome(self.ray, self.references[stage])
        if outcome.is_over:
            return self._final_state(stage, outcome)
        # Ray does not say whether a task waits for others or for a node.
        if any(name in remaining for name in self.pipeline.nodes[stage].input_names):
            return JobState("waits", "waits for its inputs")
        note = read_note(self.folder / f"{stage}.json")
        # After the death of its node a task begins again, and the first try's note is still there.
        if note is not None and note.status == "runs" and ray_client.is_alive(self.ray, note.node):
            return JobState("runs", f"runs on {note.message}")
        return self._waiting_state(stage)

    def _final_state(self, stage: str, outcome: ray_client.Outcome) -> JobState:
        if outcome.result == "done":
            return JobState("gone", "its task is done, but its artifact is missing")
        if outcome.is_lost:
            retries = executor_settings(self.pipeline, RayExecutor, stage).retries
            return JobState("over", outcome.error, f"Raise runtime.stages.{stage}.executor.retries (now {retries}).")
        # A task that was cancelled or raised an error has no result.
        return JobState("over", outcome.error or str(outcome.result).removeprefix("failed: "))

    def _waiting_state(self, stage: str) -> JobState:
        """Return the state of a task that could start: it waits for a free node, or for a node that does not exist yet.

        After ``wait`` seconds without such a node the task is cancelled.
        """
        block = executor_settings(self.pipeline, RayExecutor, stage)
        if ray_client.could_hold(self.ray, block):
            self._unplaced_since.pop(stage, None)
            return JobState("waits", "waits for a free node")
        needs = ray_client.describe_resources(block)
        since = self._unplaced_since.setdefault(stage, time.monotonic())
        if time.monotonic() - since <= block.wait:
            return JobState("waits", f"waits: no node has what it asks for ({needs})")
        ray_client.cancel(self.ray, [self.references[stage]])
        self._cancelled[stage] = JobState(
            "over",
            f"no node of the Ray cluster has what it asks for ({needs})",
            f"Start such a node, or change runtime.stages.{stage}.executor.",
        )
        return self._cancelled[stage]

    def result(self, stage: str) -> JobResult | None:
        """Return the result of the stage's task, if it has ended."""
        note = read_note(self.folder / f"{stage}.json")
        return None if note is None or note.status == "runs" else note

    def log(self, stage: str) -> Path:
        """Return the stage's own log; what a task prints goes to Ray."""
        node = self.pipeline.nodes[stage]
        return self.store.partial(node.stage.kind, node.key) / LOG

    def replaces(self, stage: str) -> str | None:
        """Return the creation time of the artifact that a forced stage replaces."""
        return self._replaces.get(stage)


CONTINUES = "Finished stages and checkpoints are kept. The same command continues."


def run_tasks(pipeline: Pipeline, ready: Prepared, listener: Listener) -> Run:
    """Start a task for each stage that is to be made, and report them to ``listener`` until all are over.

    The tasks end with this process. Raises ``StageFailed``, and ``Stopped`` once USR1 has asked them to stop.
    """
    store = ready.store
    with (
        StopRequest().handle_signals(signal.SIGUSR1) as stop,
        ray_client.connected(executor_settings(pipeline, RayExecutor).address) as ray,
        store.use(pipeline.name, pipeline.references, pipeline.plain, module_folders()),
    ):
        queue = RayQueue(ray, pipeline, store, _note_folder(store, pipeline.name), stop=stop)
        # All tasks at once: each waits for its inputs, and Ray places them as resources become free.
        queue.start(ready.wanted, ready.force)
        stages = [node.name for node in ready.wanted]
        try:
            return JobFollower(pipeline, store, stages, queue, listener).follow()
        except StageFailed as error:
            if stop.is_requested:
                raise Stopped(f"stopped as asked. {CONTINUES}") from error
            raise
        except BaseException:
            # Tasks would otherwise work on without anyone who follows them.
            ray_client.cancel(ray, list(queue.references.values()))
            raise


def _note_folder(store: Store, run: str) -> Path:
    """Create the folder for the notes of this run's tasks."""
    folder = store.root / JOBS / run / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
