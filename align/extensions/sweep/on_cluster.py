"""The workers of a sweep on a cluster: an array of Slurm jobs, or Ray tasks, which share the study in the store."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.cli.slurm_job import SHARE_OF_GRACE, cores_of_job, requeue, turn_number
from align.clusters import slurm_commands
from align.clusters.follow import LATE_SECONDS, SILENT_SECONDS, JobResult, SchedulerError, executor_settings
from align.clusters.slurm_commands import check_cluster
from align.clusters.slurm_submission import Submission, sbatch_options, submissions, write_script
from align.clusters.slurm_submit import SlurmQueue
from align.config.runtime.executor import RayExecutor, SlurmExecutor
from align.errors import StageFailed, UserError, printable
from align.extensions.sweep.plan import Sweep
from align.extensions.sweep.worker_pool import POLL_SECONDS, SweepTask, WorkerEnd, with_cores
from align.inference import ray_client
from align.pipeline.stop_signal import Stopped, StopRequest
from align.store.record import MARKER
from align.store.store import Store

MODULE = "align.extensions.sweep.on_cluster"
"""This module, which the jobs run."""

# ---- Slurm ----------------------------------------------------------------------------------------------------------


class SlurmWorkers:
    """Workers in the jobs of an array, which outlive this command."""

    every = SlurmQueue.every

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.last_answer = time.monotonic()
        self.gone_seconds = 0.0

    @classmethod
    def start(cls, sweep: Sweep, store: Store, count: int, options: argparse.Namespace) -> SlurmWorkers:
        """Submit ``count`` jobs, or find the jobs of an earlier command, and print which."""
        submission = _find_live(store, sweep.config.name)
        if submission is None:
            submission = submit_workers(sweep, store, count, options)
            print(f"job {_job_of(submission)}: {count} workers", file=sys.stderr)
        else:
            count = (submission.sweep or {})["workers"]
            print(f"job {_job_of(submission)} works on it already, {count} workers", file=sys.stderr)
        return cls(submission)

    @property
    def job(self) -> int:
        """Slurm's number of the array."""
        return _job_of(self.submission)

    def poll(self) -> list[WorkerEnd | None]:
        """Return the end of each worker. Raises ``StageFailed`` if Slurm has been silent for too long."""
        job = None
        try:
            job = slurm_commands.jobs([self.job]).get(self.job)
            self.last_answer = time.monotonic()
        except SchedulerError as error:
            if time.monotonic() - self.last_answer > SILENT_SECONDS:
                raise StageFailed(f"Slurm has not answered for {SILENT_SECONDS / 60:.0f} min ({error}).") from None
        count = int((self.submission.sweep or {})["workers"])
        results = [self.submission.result(f"worker-{number}") for number in range(count)]
        # The array is over if Slurm says so just now. The notes of its workers may appear later.
        has_answered = time.monotonic() - self.last_answer < self.every
        if not has_answered or (job is not None and job.is_live):
            return [None] * count
        is_complete = all(result is not None and result.status != "stopped" for result in results)
        if not is_complete and self.gone_seconds <= LATE_SECONDS:
            self.gone_seconds += self.every
            return [None] * count
        return [self._end(result, job) for result in results]

    def _end(self, result: JobResult | None, job: slurm_commands.Job | None) -> WorkerEnd:
        if result is None or result.status == "stopped":
            state = slurm_commands.OVER.get(job.state if job else "", "its job is gone")
            return WorkerEnd(
                StageFailed.exit_code,
                f"{state} (job {self.job}). Logs: {self.submission.folder}. The same command continues with the rest.",
            )
        if result.status == "done":
            return WorkerEnd()
        error = UserError if result.status == "refused" else StageFailed
        return WorkerEnd(error.exit_code, result.message)

    def stop(self) -> None:
        """Stop following the jobs, which continue. Raises ``Stopped``."""
        raise Stopped("stopped as asked.")

    def abandon(self) -> None:
        """Say that the jobs continue."""
        name = self.submission.run
        print(
            f"\nNo longer followed; its jobs continue. The same command follows them again, `align cancel {name}` ends "
            "them.",
            file=sys.stderr,
        )


def _job_of(submission: Submission) -> int:
    return int((submission.sweep or {})["job"])


def _find_live(store: Store, name: str) -> Submission | None:
    """Return a submission of this sweep whose jobs wait or run."""
    candidates = []
    for submission in submissions(store, name):
        is_submitted = bool(submission.sweep and submission.sweep.get("job"))
        if is_submitted and not submission.is_cancelled:
            candidates.append(submission)
    try:
        states = slurm_commands.jobs({_job_of(submission) for submission in candidates})
    except SchedulerError as error:
        raise UserError(f"executor slurm: Slurm does not answer ({error}). Nothing was submitted.") from None
    for submission in candidates:
        job = states.get(_job_of(submission))
        if job is not None and job.is_live:
            return submission
    return None


def submit_workers(sweep: Sweep, store: Store, count: int, options: argparse.Namespace) -> Submission:
    """Submit an array of ``count`` jobs. Raises ``UserError`` if Slurm refuses it."""
    block = executor_settings(sweep.base, SlurmExecutor)
    check_cluster({"runtime.executor": block}, store.root, sweep.base.where)
    about: dict[str, Any] = {"task": asdict(SweepTask.of(sweep, store, options)), "workers": count, "job": None}
    submission = Submission.begin(store, sweep.base, sweep.config.name, about)
    script = submission.folder / "worker.sh"
    write_script(script, f"sweep {submission.run}", [str(submission.folder)], block.setup, MODULE)
    name = f"align:{submission.run}"
    words = sbatch_options(block, name, submission.folder, Path.cwd(), log="worker-%a.log")
    words.append(f"--array=0-{count - 1}")
    try:
        slurm_commands.check(words, script)
        submission.sweep = {**about, "job": slurm_commands.submit(words, script)}
    except SchedulerError as error:
        submission.mark_cancelled()
        raise UserError(f"{sweep.base.where}: Slurm refuses the jobs ({error}). Change runtime.executor.") from None
    submission.write()
    return submission


def main(folder: Path) -> int:
    """Run one worker of the array: trials until none is left; returns the exit code."""
    submission = Submission.read(folder)
    task = SweepTask(**(submission.sweep or {})["task"])
    worker = f"worker-{os.environ.get('SLURM_ARRAY_TASK_ID') or 0}"
    turn = turn_number()
    stop = StopRequest()
    with stop.handle_signals(signal.SIGUSR1, signal.SIGTERM):
        try:
            sweep = with_cores(task.check(), cores_of_job())
            stop.patience = SHARE_OF_GRACE * executor_settings(sweep.base, SlurmExecutor).grace
            task.run(sweep, stop, quiet=False)
        except (UserError, StageFailed) as error:
            print(printable(str(error)), file=sys.stderr)
            status = "refused" if isinstance(error, UserError) else "failed"
            submission.write_result(worker, JobResult(status, str(error), turn))
            return error.exit_code
        except Stopped as stopped:
            result = JobResult("stopped", str(stopped), turn)
            return requeue(submission, worker, result, executor_settings(sweep.base, SlurmExecutor).requeue)
    submission.write_result(worker, JobResult("done", "", turn))
    return 0


# ---- Ray ------------------------------------------------------------------------------------------------------------


class RayWorkers:
    """Workers in tasks of a Ray cluster, which end with this command."""

    every = POLL_SECONDS

    def __init__(self, ray: Any, sweep: Sweep, store: Store, count: int, options: argparse.Namespace) -> None:
        block = executor_settings(sweep.base, RayExecutor)
        if not ray_client.could_hold(ray, block):
            raise UserError(
                f"{sweep.base.where}: runtime.executor: no node of the Ray cluster has what a worker asks for "
                f"({ray_client.describe_resources(block)})."
            )
        self.ray = ray
        task = asdict(SweepTask.of(sweep, store, options))
        arguments = [task, max(1, int(block.cpus))]
        names = [f"align:{sweep.config.name}:{number}" for number in range(count)]
        self.references = [ray_client.start(ray, run_worker_task, block, name, arguments) for name in names]

    def poll(self) -> list[WorkerEnd | None]:
        """Return the end of each task."""
        return [self._end(ray_client.outcome(self.ray, reference)) for reference in self.references]

    def _end(self, outcome: ray_client.Outcome) -> WorkerEnd | None:
        if not outcome.is_over:
            return None
        if outcome.error:
            return WorkerEnd(StageFailed.exit_code, outcome.error)
        code, message = outcome.result
        return WorkerEnd(code, message)

    def stop(self) -> None:
        """Cancel the tasks: Ray passes on no signal."""
        ray_client.cancel(self.ray, self.references)

    def abandon(self) -> None:
        """Cancel the tasks."""
        self.stop()


def run_worker_task(fields: dict[str, Any], cores: int) -> tuple[int, str]:
    """Run trials until none is left, as a Ray task.

    Args:
        fields: The fields of a ``SweepTask``.
        cores: Cores that Ray reserves for the task.

    Returns:
        The exit code that a process would have, and the error that ended the task too early.
    """
    task = SweepTask(**fields)
    folder = task.store["folder"]
    if not (Path(folder) / MARKER).is_file():
        message = f"node {socket.gethostname()} does not see the store {folder}; all nodes must, under the same path"
        return StageFailed.exit_code, message
    os.chdir(task.base)
    try:
        task.run(with_cores(task.check(), cores), StopRequest())
    except (UserError, StageFailed) as error:
        return error.exit_code, str(error)
    return 0, ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
