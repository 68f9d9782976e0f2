"""The program of a Slurm job: ``python -m align.cli.slurm_job FOLDER STAGE``.

It runs one stage of the submission in ``FOLDER``, under the store's lock like any run. On a request to stop (USR1
before the time limit or at a preemption, SIGTERM), it makes the stage save a checkpoint and requeues its job, which
then resumes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from align.clusters import slurm_commands
from align.clusters.follow import JobResult, SchedulerError, await_inputs, executor_settings, with_threads
from align.clusters.slurm_submission import Submission
from align.config.runtime.executor import SlurmExecutor
from align.errors import StageFailed, UserError, printable
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import ConsoleListener
from align.runner.runner import run_pipeline
from align.runs.run_page import Failure, outline_of, try_write_page
from align.store.artifacts import CHECKPOINTS, LOG, Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.store import Store

SHARE_OF_GRACE = 0.75
"""Share of Slurm's grace period that the stage may use; the rest is for ending it and for requeueing."""
IDLE_TURNS = 3
"""Turns in a row that may end without a new checkpoint."""
ENDING = ("CANCELLED", "COMPLETING", "TIMEOUT")
"""States of a job that Slurm is ending already; a requeue would bring it back to life."""


@dataclass(frozen=True)
class _Turn:
    """One turn of the job of a stage."""

    submission: Submission
    stage: str
    store: Store
    number: int
    """Times that the job had been requeued before."""


def main(folder: Path, stage: str) -> int:
    """Run one stage; returns the exit code: 0 done, 1 or 2 failed, 75 stopped and requeued."""
    submission = Submission.read_for(folder, stage)
    log: Path | None = None
    stop = StopRequest()
    with stop.handle_signals(signal.SIGUSR1, signal.SIGTERM):
        store = submission.store.open()
        turn = _Turn(submission, stage, store, turn_number())
        try:
            pipeline = with_meeting_place(with_threads(submission.pipeline(), cores_of_job()))
            node = pipeline.nodes[stage]
            stop.patience = SHARE_OF_GRACE * executor_settings(pipeline, SlurmExecutor, stage).grace
            log = store.partial(node.stage.kind, node.key) / LOG
            _run_stage(submission, pipeline, node, store, stop)
        except (UserError, StageFailed) as error:
            if not stop.is_requested:
                return _fail(turn, error, log)
            # Slurm's SIGTERM goes to every process of a job: the stage's own may end by it before it can save.
            reason = f"ended while it was asked to stop: {error}".partition("\nLog: ")[0]
            return _stop(turn, Stopped(reason))
        except Stopped as stopped:
            return _stop(turn, stopped)
    submission.write_result(stage, JobResult("done", "", turn.number))
    if all(store.find_intact(node.stage.kind, node.key) is not None for node in pipeline):
        try_write_page(outline_of(pipeline), store, None)
    return 0


def turn_number() -> int:
    """Return how often this job has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _run_stage(submission: Submission, pipeline: Pipeline, node: Node, store: Store, stop: StopRequest) -> None:
    job = submission.job_of(node.name)
    await_inputs(pipeline, node, store)
    # A forced stage that an earlier turn has published is done.
    artifact = store.find_intact(node.stage.kind, node.key, node.name)
    is_forced = job.force and (artifact is None or artifact.record["created"] == job.replaces)
    with _JobListener([node]) as listener:
        run_pipeline(
            pipeline,
            store=store,
            only=node.name,
            rebuild=(node.name,) if is_forced else (),
            listener=listener,
            stop=stop,
        )


class _JobListener(ConsoleListener):
    """Prints a line at the start and the end, into the job's log."""

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Print no line: the jobs of the inputs have reported them."""


def with_meeting_place(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with this node, the job's first, as the rendezvous of a stage's nodes."""
    runtimes = pipeline.runtimes.values()
    if all(runtime.launch.nowhere_to_meet() is None for runtime in runtimes):
        return pipeline
    # Several jobs on one node need different ports.
    job = "".join(filter(str.isdigit, os.environ.get("SLURM_JOB_ID", "0")))
    port = 20000 + int(job or 0) % 12000
    runtime = pipeline.raw.get("runtime", {})
    launch = {**runtime.get("launch", {}), "rendezvous": f"{socket.gethostname()}:{port}"}
    raw = {**pipeline.raw, "runtime": {**runtime, "launch": launch}}
    return Pipeline(raw, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def cores_of_job() -> int | None:
    """Return the cores that Slurm says this job has; it may not bind a job to them."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return int(cores) if cores.isdigit() else None


def _fail(turn: _Turn, error: UserError | StageFailed, log: Path | None) -> int:
    """Record a failure, print it, and write the page; returns the exit code."""
    submission = turn.submission
    stage = turn.stage
    text = str(error)
    print("\n".join(printable(line) for line in text.splitlines()), file=sys.stderr)
    message = text.partition("\nLog: ")[0].removeprefix(f"stage '{stage}' failed: ").removeprefix(f"stage '{stage}': ")
    log_path = str(log) if log is not None and log.is_file() else None
    status = "refused" if isinstance(error, UserError) else "failed"
    submission.write_result(stage, JobResult(status, message, turn.number, log_path))
    pipeline = Pipeline(submission.raw, submission.where, Path(submission.base), submission.rounds)
    try_write_page(outline_of(pipeline), turn.store, Failure(stage, message, log))
    return error.exit_code


# ---- stopped and requeued -------------------------------------------------------------------------------------------


def _stop(turn: _Turn, stopped: Stopped) -> int:
    """Requeue the job unless it was cancelled or makes no progress; returns the exit code."""
    stage = turn.stage
    block = executor_settings(turn.submission.pipeline(), SlurmExecutor, stage)
    # A stage that never reaches a checkpoint would be requeued forever.
    if _count_idle_turns(turn) >= IDLE_TURNS:
        error = StageFailed(
            f"stage '{stage}' failed: {IDLE_TURNS} turns of its job in a row ended without a new checkpoint. Give it "
            f"more time (runtime.stages.{stage}.executor.time, now {block.time or 'as the partition has it'}; grace, "
            f"now {block.grace} s), or have it save more often."
        )
        return _fail(turn, error, None)
    message = str(stopped).removeprefix(f"stage '{stage}' ")
    return requeue(turn.submission, stage, JobResult("stopped", message, turn.number), block.requeue)


def requeue(submission: Submission, name: str, result: JobResult, may_requeue: bool) -> int:
    """Record the result of a stopped turn, and requeue this job unless it was cancelled; returns the exit code."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # The note comes first: a requeue ends this process.
    submission.write_result(name, result)
    state = slurm_commands.state_of(job)
    if state in slurm_commands.WAITING:  # Slurm itself has requeued it, for example after its node failed
        print(result.message, file=sys.stderr)
        return Stopped.exit_code
    if not may_requeue or submission.is_cancelled or state in ENDING:
        print(f"{result.message} Not requeued.", file=sys.stderr)
        return Stopped.exit_code
    print(f"{result.message} Its job is requeued.", file=sys.stderr, flush=True)
    try:
        slurm_commands.requeue(job)
    except SchedulerError as error:
        print(f"It could not be requeued: {error}. Run the same command to continue.", file=sys.stderr)
    return Stopped.exit_code


class _Turns(BaseModel):
    """Content of ``<stage>.turns.json``."""

    checkpoints: list[str] | None = None
    """Files of the stage's checkpoints after the last turn."""
    idle: int = 0
    """Turns in a row that have left them unchanged."""


def _count_idle_turns(turn: _Turn) -> int:
    """Return how many turns in a row, including this turn, have left the stage's checkpoints unchanged."""
    job = turn.submission.job_of(turn.stage)
    folder = turn.store.partial(job.kind, job.key) / CHECKPOINTS
    checkpoints = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    file = turn.submission.folder / f"{turn.stage}.turns.json"
    try:
        before = read_sealed(file, _Turns)
    except (FileNotFoundError, DamagedFile):  # gives the stage one turn more
        before = _Turns()
    is_idle = before.checkpoints == checkpoints or (before.checkpoints is None and not checkpoints)
    idle = before.idle + 1 if is_idle else 0
    write_sealed(file, {"checkpoints": checkpoints, "idle": idle})
    return idle


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
