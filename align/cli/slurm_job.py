"""What a job of Slurm runs: ``python -m align.cli.slurm_job FOLDER STAGE``.

One stage of the submission in ``FOLDER``, under the store's lock as any run's. Asked to stop (USR1 before the time
limit or at a preemption, SIGTERM), it has the stage save a checkpoint and queues its job again, to go on from there.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from pydantic import BaseModel

from align.cli.console import ConsoleListener, printable
from align.cli.run_page import Failure, run_of, try_page
from align.clusters.follow import NoAnswer, Said
from align.clusters.slurm import commands
from align.clusters.slurm.submission import Submission
from align.clusters.threads import await_inputs, with_threads
from align.errors import StageFailed, UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.runner import run_pipeline
from align.store.artifacts import Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed
from align.store.partial import CHECKPOINTS, LOG
from align.store.store import Store

SHARE_OF_GRACE = 0.75
"""Of the time that Slurm gives, what the stage may take; the rest is for ending it and for queueing again."""
IDLE_TURNS = 3
"""Turns in a row that may end without a new checkpoint."""
ENDING = ("CANCELLED", "COMPLETING", "TIMEOUT")
"""States of a job that Slurm is ending already; queued again, it would come back to life."""


def main(folder: Path, stage: str) -> int:
    """Make one stage; the exit code: 0 done, 1 or 2 failed, 75 stopped and queued again."""
    submission = Submission.read(folder)
    turn = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    log: Path | None = None
    stop = StopRequest()
    with stop.handle_signals(signal.SIGUSR1, signal.SIGTERM):
        store = submission.store.open()
        try:
            pipeline = with_meeting_place(with_threads(submission.pipeline(), cores_of_job()))
            node = pipeline.nodes[stage]
            stop.patience = SHARE_OF_GRACE * pipeline.runtimes[stage].slurm.grace
            log = store.partial(node.stage.kind, node.key) / LOG
            _run(submission, pipeline, node, store, stop)
        except (UserError, StageFailed) as error:
            if not stop.is_requested:
                return _fail(submission, stage, error, turn, log, store)
            # Slurm's SIGTERM goes to every process of a job: the stage's own may end by it before it can save
            return _stop(
                submission,
                stage,
                Stopped(f"ended while it was asked to stop: {error}".partition("\nLog: ")[0]),
                turn,
                store,
            )
        except Stopped as stopped:
            return _stop(submission, stage, stopped, turn, store)
    submission.say(stage, Said("done", "", turn))
    if all(store.find_intact(one.stage.kind, one.key) is not None for one in pipeline):
        try_page(run_of(pipeline), store, None)
    return 0


def _run(submission: Submission, pipeline: Pipeline, node: Node, store: Store, stop: StopRequest) -> None:
    job = submission.job_of(node.name)
    await_inputs(pipeline, node, store)
    found = store.find_intact(node.stage.kind, node.key, node.name)
    anew = job.anew and (found is None or found.record["created"] == job.replaces)
    with _Lines([node]) as listener:
        run_pipeline(
            pipeline, store=store, only=node.name, rebuild=(node.name,) if anew else (), listener=listener,
            stop=stop,
        )  # fmt: skip


class _Lines(ConsoleListener):
    """A line at the start and the end, in the job's own log."""

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """What the stage reads was told of where it was made."""


def with_meeting_place(pipeline: Pipeline) -> Pipeline:
    """The pipeline with this node, the job's first, as the place where the nodes of a stage meet."""
    runtimes = pipeline.runtimes.values()
    if all(one.launch.nowhere_to_meet() is None for one in runtimes):
        return pipeline
    # of several jobs on one node each has a port of its own
    port = 20000 + int("".join(filter(str.isdigit, os.environ.get("SLURM_JOB_ID", "0"))) or 0) % 12000
    runtime = pipeline.raw.get("runtime", {})
    launch = {**runtime.get("launch", {}), "rendezvous": f"{socket.gethostname()}:{port}"}
    raw = {**pipeline.raw, "runtime": {**runtime, "launch": launch}}
    return Pipeline(raw, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def cores_of_job() -> int | None:
    """The cores that this job has, as Slurm says; it may not bind a job to them."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    return int(cores) if cores.isdigit() else None


def _fail(
    submission: Submission, stage: str, error: UserError | StageFailed, turn: int, log: Path | None, store: Store
) -> int:
    text = str(error)
    print("\n".join(printable(line) for line in text.splitlines()), file=sys.stderr)
    message = text.partition("\nLog: ")[0].removeprefix(f"stage '{stage}' failed: ").removeprefix(f"stage '{stage}': ")
    known = str(log) if log is not None and log.is_file() else None
    submission.say(stage, Said("refused" if isinstance(error, UserError) else "failed", message, turn, known))
    pipeline = Pipeline(submission.raw, submission.where, Path(submission.base), submission.rounds)
    try_page(run_of(pipeline), store, Failure(stage, message, log))
    return error.exit_code


# ---- stopped, and queued again --------------------------------------------------------------------------------------


def _stop(submission: Submission, stage: str, stopped: Stopped, turn: int, store: Store) -> int:
    """Queue the job again unless it was called off, or gets nowhere."""
    block = submission.pipeline().runtimes[stage].slurm
    if _idle_turns(submission, stage, store) >= IDLE_TURNS:
        error = StageFailed(
            f"stage '{stage}' failed: {IDLE_TURNS} turns of its job in a row ended without a new checkpoint. Give it "
            f"more time (runtime.stages.{stage}.slurm.time, now {block.time or 'as the partition has it'}; grace, now "
            f"{block.grace} s), or have it save more often."
        )
        return _fail(submission, stage, error, turn, None, store)
    return queue_again(submission, stage, str(stopped).removeprefix(f"stage '{stage}' "), turn, block.requeue)


def queue_again(submission: Submission, name: str, message: str, turn: int, wanted: bool) -> int:
    """Queue this job again, unless it was called off or that is not ``wanted``; the exit code of a stop."""
    job = os.environ.get("SLURM_JOB_ID", "")
    submission.say(name, Said("stopped", message, turn))
    state = commands.state_of(job)
    if state in commands.WAITING:  # Slurm itself has queued it again, as where its node failed
        print(message, file=sys.stderr)
        return Stopped.exit_code
    if not wanted or submission.is_called_off or state in ENDING:
        print(f"{message} Not queued again.", file=sys.stderr)
        return Stopped.exit_code
    print(f"{message} Its job is queued again.", file=sys.stderr, flush=True)
    try:
        commands.requeue(job)
    except NoAnswer as error:
        print(f"It could not be queued again: {error}. The same command goes on.", file=sys.stderr)
    return Stopped.exit_code


class _Turns(BaseModel):
    """The content of ``<stage>.turns.json``."""

    checkpoints: list[str] | None = None
    """After the last turn."""
    idle: int = 0
    """Turns in a row that have left them as they were."""


def _idle_turns(submission: Submission, stage: str, store: Store) -> int:
    """How many turns in a row, this one included, have left the stage's checkpoints as they were."""
    job = submission.job_of(stage)
    folder = store.partial(job.kind, job.key) / CHECKPOINTS
    now = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    file = submission.folder / f"{stage}.turns.json"
    try:
        before = read_sealed(file, _Turns)
    except (FileNotFoundError, DamagedFile):  # a turn more is given
        before = _Turns()
    stands_still = before.checkpoints == now or (before.checkpoints is None and not now)
    idle = before.idle + 1 if stands_still else 0
    write_sealed(file, {"checkpoints": now, "idle": idle})
    return idle


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
