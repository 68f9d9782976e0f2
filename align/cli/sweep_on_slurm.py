"""A sweep on Slurm: the sweep's workers as an array of jobs, which share the study through the store."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from align.cli.parser import print_json
from align.cli.slurm_job import SHARE_OF_GRACE, cores_of_job, requeue, turn_number
from align.cli.sweep_table import print_changes
from align.cli.sweep_worker import run_trials
from align.clusters.follow import LATE_SECONDS, SILENT_SECONDS, JobResult, SchedulerError
from align.clusters.slurm import commands
from align.clusters.slurm.checks import check_cluster
from align.clusters.slurm.queue import SlurmQueue
from align.clusters.slurm.script import sbatch_options, write_script
from align.clusters.slurm.submission import Submission, submissions
from align.clusters.slurm.submit import slurm_block
from align.clusters.threads import with_threads
from align.errors import StageFailed, UserError, printable
from align.pipeline.stop_signal import Stopped, StopRequest
from align.store.atomic_write import write_text_atomically
from align.store.store import Store
from align.sweep.config import load_sweep
from align.sweep.plan import Sweep
from align.sweep.study import Study

FILE = "sweep.yaml"


def sweep_on_slurm(sweep: Sweep, study: Study, store: Store, workers: int, options: argparse.Namespace) -> bool:
    """Submit ``workers`` jobs, or find those of before, and follow them; returns True when they are left alone."""
    name = sweep.config.name
    submission = _find_live(store, name)
    if submission is None:
        submission = _submit(sweep, store, workers, options.assignments, options.on)
        print(f"job {_job(submission)}: {workers} workers", file=sys.stderr)
    elif submission.sweep is not None:
        print(f"job {_job(submission)} works on it already, {submission.sweep['workers']} workers", file=sys.stderr)
    if options.detach:
        if options.json:
            print_json({"name": name, "store": str(store.root), "job": _job(submission)})
        return True
    try:
        _follow(sweep, study, submission, quiet=options.json)
    except KeyboardInterrupt:
        print(
            f"\nNo longer followed; its jobs go on. The same command follows them again, `align cancel {name}` ends "
            "them.",
            file=sys.stderr,
        )
        raise
    return False


def _job(submission: Submission) -> int:
    return int((submission.sweep or {})["job"])


def _find_live(store: Store, name: str) -> Submission | None:
    """Return a submission of this sweep whose jobs wait or run."""
    candidates = [
        submission
        for submission in submissions(store, name)
        if submission.sweep and submission.sweep.get("job") and not submission.is_cancelled
    ]
    try:
        states = commands.jobs({_job(submission) for submission in candidates})
    except SchedulerError as error:
        raise UserError(f"executor slurm: Slurm does not answer ({error}). Nothing was submitted.") from None
    for submission in candidates:
        job = states.get(_job(submission))
        if job is not None and job.is_live:
            return submission
    return None


def _submit(sweep: Sweep, store: Store, workers: int, assignments: list[str], on: str | None) -> Submission:
    block = slurm_block(sweep.base)
    check_cluster({"runtime.executor": block}, store.root, sweep.base.where)
    about = {"where": sweep.where, "assignments": list(assignments), "on": on, "workers": workers, "job": None}
    submission = Submission.begin(store, sweep.base, sweep.config.name, about)
    config = sweep.config.model_dump(mode="json", exclude_unset=True)
    # The copy lies elsewhere, and a relative path would start there.
    config["pipeline"] = str(Path(config["pipeline"]).absolute())
    write_text_atomically(submission.folder / FILE, yaml.safe_dump(config, sort_keys=False))
    title, script = f"sweep {submission.run}", submission.folder / "worker.sh"
    write_script(script, title, [str(submission.folder)], block.setup, "align.cli.sweep_on_slurm")
    name = f"align:{submission.run}"
    options = sbatch_options(block, name, submission.folder, Path.cwd(), log="worker-%a.log")
    options.append(f"--array=0-{workers - 1}")
    try:
        commands.check(options, script)
        about["job"] = commands.submit(options, script)
    except SchedulerError as error:
        submission.mark_cancelled()
        raise UserError(
            f"{sweep.base.where}: Slurm does not take the jobs ({error}). Change runtime.executor."
        ) from None
    submission.write()
    return submission


def _follow(sweep: Sweep, study: Study, submission: Submission, quiet: bool) -> None:
    """Print trials that begin or end, until no worker is left. Raises what ended a worker too early."""
    states = {trial.number: trial.state for trial in study.trials()}
    number = _job(submission)
    last_answer, gone_seconds = time.monotonic(), 0.0
    while True:
        job = None
        try:
            job = commands.jobs([number]).get(number)
            last_answer = time.monotonic()
        except SchedulerError as error:
            if time.monotonic() - last_answer > SILENT_SECONDS:
                raise StageFailed(f"Slurm has not answered for {SILENT_SECONDS / 60:.0f} min ({error}).") from None
        print_changes(sweep, study, states, quiet)
        # The array is over when Slurm says so just now. The notes of its workers may be seen later, for a while.
        is_over = (job is None or not job.is_live) and time.monotonic() - last_answer < SlurmQueue.every
        if is_over:
            results = _results(submission)
            is_complete = all(result is not None and result.status != "stopped" for result in results)
            if is_complete or gone_seconds > LATE_SECONDS:
                break
            gone_seconds += SlurmQueue.every
        time.sleep(SlurmQueue.every)
    _raise_for(results, submission, job)


def _results(submission: Submission) -> list[JobResult | None]:
    """Return the result of each worker's last turn; None for a worker that has written none."""
    workers = int((submission.sweep or {})["workers"])
    return [submission.result(f"worker-{number}") for number in range(workers)]


def _raise_for(results: list[JobResult | None], submission: Submission, job: commands.Job | None) -> None:
    """Raise ``StageFailed`` where a worker has failed, or ended without a result."""
    failed = [result for result in results if result is not None and result.status in ("failed", "refused")]
    if failed:
        raise StageFailed(f"{len(failed)} of {len(results)} workers failed: {failed[0].message}")
    missing = sum(result is None or result.status == "stopped" for result in results)
    if missing:
        state = commands.OVER.get(job.state if job else "", "its job is gone")
        raise StageFailed(
            f"{missing} of {len(results)} workers failed: {state} (job {_job(submission)}). Logs: "
            f"{submission.folder}. The same command goes on with what is left."
        )


# ---- in a job -------------------------------------------------------------------------------------------------------


def main(folder: Path) -> int:
    """Run one worker of the array: trials until none is left; returns the exit code."""
    submission = Submission.read(folder)
    about = submission.sweep or {}
    worker = f"worker-{os.environ.get('SLURM_ARRAY_TASK_ID') or 0}"
    turn = turn_number()
    stop = StopRequest()
    with stop.handle_signals(signal.SIGUSR1, signal.SIGTERM):
        store = submission.store.open()
        try:
            config = load_sweep(folder / FILE)
            sweep = Sweep.check(config, about["where"], about["assignments"], about["on"])
            stop.patience = SHARE_OF_GRACE * slurm_block(sweep.base).grace
            sweep = replace(sweep, base=with_threads(sweep.base, cores_of_job()))
            study = Study.open(store, sweep)
            run_trials(sweep, study, store, quiet=False, shows_stages=False, stop=stop)
        except (UserError, StageFailed) as error:
            print(printable(str(error)), file=sys.stderr)
            submission.write_result(worker, JobResult("failed", str(error), turn))
            return error.exit_code
        except Stopped as stopped:
            result = JobResult("stopped", str(stopped), turn)
            return requeue(submission, worker, result, slurm_block(sweep.base).requeue)
    submission.write_result(worker, JobResult("done", "", turn))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
