"""``align sweep --on slurm``: the sweep's workers as an array of jobs, which share the study through the store."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from align.cli.console import printable
from align.cli.parser import print_json
from align.cli.slurm_job import SHARE_OF_GRACE, cores_of_job, queue_again
from align.cli.sweep import work_here
from align.cli.sweep_table import say_changes
from align.clusters.follow import LATE_SECONDS, SILENT_SECONDS, NoAnswer, Said
from align.clusters.slurm import commands
from align.clusters.slurm.checks import check_cluster
from align.clusters.slurm.queue import SlurmQueue
from align.clusters.slurm.script import sbatch_options, write_script
from align.clusters.slurm.submission import Submission, submissions
from align.clusters.threads import with_threads
from align.errors import StageFailed, UserError
from align.pipeline.stop_signal import Stopped, StopRequest
from align.store.atomic_write import write_text_atomically
from align.store.store import Store
from align.sweep.config import load_sweep
from align.sweep.plan import Sweep
from align.sweep.study import Study

FILE = "sweep.yaml"


def sweep_on_slurm(sweep: Sweep, study: Study, store: Store, workers: int, options: argparse.Namespace) -> bool:
    """Submit ``workers`` jobs, or take up those there are, and follow them; whether they are left to themselves."""
    name = sweep.config.name
    submission = _live(store, name)
    if submission is None:
        submission = _submit(sweep, store, workers, options.assignments)
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


def _live(store: Store, name: str) -> Submission | None:
    """A submission of this sweep whose jobs wait or run."""
    known = {int(one.sweep["job"]): one for one in submissions(store, name) if one.sweep and one.sweep.get("job")}
    try:
        states = commands.jobs(known)
    except NoAnswer as error:
        raise UserError(f"--on slurm: Slurm does not answer ({error}). Nothing was submitted.") from None
    live = [one for job, one in known.items() if job in states and states[job].is_live and not one.is_called_off]
    return live[0] if live else None


def _submit(sweep: Sweep, store: Store, workers: int, assignments: list[str]) -> Submission:
    block = sweep.base.config.runtime.slurm
    check_cluster({"runtime.slurm": block}, store.root, sweep.base.where)
    about = {"where": sweep.where, "assignments": list(assignments), "workers": workers, "job": None}
    made = Submission.begin(store, sweep.base, sweep.config.name, about)
    config = sweep.config.model_dump(mode="json", exclude_unset=True)
    write_text_atomically(made.folder / FILE, yaml.safe_dump(config, sort_keys=False))
    script = write_script(
        made.folder / "worker.sh", f"sweep {made.run}", [str(made.folder)], block.setup, "align.cli.sweep_on_slurm"
    )
    asked = sbatch_options(block, f"align:{made.run}", made.folder, Path.cwd(), log="worker-%a.log")
    asked.append(f"--array=0-{workers - 1}")
    try:
        commands.check(asked, script)
        about["job"] = commands.submit(asked, script)
    except NoAnswer as error:
        made.call_off()
        raise UserError(f"{sweep.base.where}: Slurm does not take the jobs ({error}). Change runtime.slurm.") from None
    made.write()
    return made


def _follow(sweep: Sweep, study: Study, submission: Submission, quiet: bool) -> None:
    """Tell of each trial that begins and ends, until no worker is left; raises what ended a worker before its time."""
    states = {one.number: one.state for one in study.tried()}
    job, answered, gone = _job(submission), time.monotonic(), 0.0
    while True:
        try:
            known = commands.jobs([job]).get(job)
            answered = time.monotonic()
        except NoAnswer as error:
            known = None
            if time.monotonic() - answered > SILENT_SECONDS:
                raise StageFailed(f"Slurm has not answered for {SILENT_SECONDS / 60:.0f} min ({error}).") from None
        say_changes(sweep, study, states, quiet)
        is_over = known is None or not known.is_live
        if is_over and time.monotonic() - answered < SlurmQueue.every:
            said = [submission.said(f"worker-{at}") for at in range(int((submission.sweep or {})["workers"]))]
            if all(one is not None and one.status != "stopped" for one in said) or gone > LATE_SECONDS:
                break
            gone += SlurmQueue.every
        time.sleep(SlurmQueue.every)
    missing = sum(one is None or one.status == "stopped" for one in said)
    failed = [one for one in said if one is not None and one.status in ("failed", "refused")]
    if failed:
        raise StageFailed(f"{len(failed)} of {len(said)} workers ended before their time: {failed[0].message}")
    if missing:
        state = commands.OVER.get(known.state if known else "", "its job is gone")
        raise StageFailed(
            f"{missing} of {len(said)} workers ended before their time: {state} (job {job}). Logs: "
            f"{submission.folder}. The same command goes on with what is left."
        )


# ---- in a job -------------------------------------------------------------------------------------------------------


def main(folder: Path) -> int:
    """One worker of the array: trials until none is left."""
    submission = Submission.read(folder)
    about = submission.sweep or {}
    me = f"worker-{os.environ.get('SLURM_ARRAY_TASK_ID') or 0}"
    turn = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    stop = StopRequest()
    with stop.handle_signals(signal.SIGUSR1, signal.SIGTERM):
        store = submission.store.open()
        try:
            config = load_sweep(folder / FILE)
            sweep = Sweep.check(config, about["where"], about["assignments"])
            stop.patience = SHARE_OF_GRACE * sweep.base.config.runtime.slurm.grace
            sweep = replace(sweep, base=with_threads(sweep.base, cores_of_job()))
            study = Study.open(store, sweep)
            work_here(sweep, study, store, quiet=False, shown=False, stop=stop)
        except (UserError, StageFailed) as error:
            print(printable(str(error)), file=sys.stderr)
            submission.say(me, Said("failed", str(error), turn))
            return error.exit_code
        except Stopped as stopped:
            return queue_again(submission, me, str(stopped), turn, sweep.base.config.runtime.slurm.requeue)
    submission.say(me, Said("done", "", turn))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
