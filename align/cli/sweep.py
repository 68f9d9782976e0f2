"""``align sweep``: a space over a pipeline's fields tried out, trials sharing what they can. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_store, print_json
from align.cli.report import add_output, output_folder, show
from align.errors import StageFailed, UserError
from align.pipeline.stop_signal import Stopped

if TYPE_CHECKING:
    from align.pipeline.pipeline import Pipeline
    from align.pipeline.stop_signal import StopRequest
    from align.runner.listener import Listener
    from align.store.store import Store
    from align.sweep.plan import Sweep
    from align.sweep.study import Study, Trial

FAILED = 1
INTERRUPTED = 130
DEVICES = "CUDA_VISIBLE_DEVICES"


def run(options: argparse.Namespace) -> int:
    """try out a space over a pipeline's fields; unchanged stages are made once, an interrupted sweep goes on"""
    from align.cli.sweep_table import print_plan, print_trials
    from align.runner.open_store import open_store
    from align.sweep.config import load_sweep
    from align.sweep.plan import Sweep
    from align.sweep.study import Study

    folder = output_folder(options.output)
    config = load_sweep(options.sweep)
    if options.trials is not None:
        config = config.model_copy(update={"trials": _positive("--trials", options.trials)})
    sweep = Sweep.check(config, options.sweep, options.assignments)
    store = open_store(sweep.base, options.store)
    if options.dry_run:
        print_plan(sweep, store, options.json)
        return 0
    if options.detach and options.on != "slurm":
        raise UserError("--detach leaves a sweep to a queue that lives without this command: give --on slurm, too.")
    workers = _positive("--workers", config.workers if options.workers is None else options.workers)
    study = Study.open(store, sweep, fresh=options.fresh and options.worker is None)
    if options.worker is not None:
        return _work_for(options, sweep, study, store)
    if options.retry:
        print(f"{study.retry()} failed trials run again", file=sys.stderr)
    try:
        if options.on == "slurm":
            from align.cli.sweep_on_slurm import sweep_on_slurm

            if sweep_on_slurm(sweep, study, store, workers, options):
                return 0
        elif options.on == "ray":
            from align.cli.sweep_on_ray import sweep_on_ray

            sweep_on_ray(sweep, study, store, workers, options)
        elif workers == 1:
            work_here(sweep, study, store, quiet=options.json, shown=not options.json)
        else:
            _start_workers(options, workers)
    except KeyboardInterrupt:
        if options.on != "slurm":
            print("\nStopped; finished trials and stages are kept. The same command continues.", file=sys.stderr)
        raise
    finally:
        page = _try_page(sweep, study, store, folder)
    if options.json:
        print_json(_document(sweep, study, store, page))
    else:
        print_trials(sweep, study)
        if page is not None:
            show(page, options.open)
    return 0 if study.best() else FAILED


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{option}: should be at least 1; found {value}.")
    return value


# ---- trials ---------------------------------------------------------------------------------------------------------


def work_here(
    sweep: Sweep, study: Study, store: Store, *, quiet: bool, shown: bool, stop: StopRequest | None = None
) -> None:
    """Run trials in this process; ``shown``: with a line a stage."""
    from align.cli.sweep_table import say_trial
    from align.sweep.worker import work

    def told(trial: Trial, how: str) -> None:
        if not quiet:
            say_trial(sweep, study, trial, how)

    work(sweep, study, store, _shown if shown else _silent, told, stop)


@contextlib.contextmanager
def _shown(pipeline: Pipeline) -> Iterator[Listener]:
    from align.cli.console import ConsoleListener

    class Made(ConsoleListener):
        """Only what is made: what all trials share would be said in each."""

        def stage_cached(self, node: Any, artifact: Any) -> None:
            """Nothing to say."""

    with Made(list(pipeline)) as listener:
        yield listener


@contextlib.contextmanager
def _silent(pipeline: Pipeline) -> Iterator[Listener]:
    from align.runner.listener import Listener

    yield Listener()


# ---- several workers ------------------------------------------------------------------------------------------------


def _start_workers(options: argparse.Namespace, count: int) -> None:
    """Run ``count`` processes of this command, each taking trials; raises what they ended with."""
    words = [options.sweep]
    for name in ("store", "trials"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    words += [word for text in options.assignments for word in ("--set", text)]
    words += ["--json"] if options.json else []
    command = [sys.executable, "-m", "align.cli.main", "sweep", *words, "--worker", f"{os.getpid()}/{count}"]
    processes = []
    for at in range(count):
        environment = {**os.environ, **_devices(os.environ.get(DEVICES), at, count)}
        # sessions of their own: Ctrl-C reaches this process, which then ends them in order
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    heard = signal.signal(signal.SIGUSR1, pass_on)
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGUSR1, heard)
    if Stopped.exit_code in codes:
        raise Stopped("stopped as asked; finished trials and stages are kept. The same command continues.")
    if any(codes):  # each has said why on standard error
        if all(code == UserError.exit_code for code in codes if code):
            raise UserError(f"{sum(map(bool, codes))} of {count} workers ended before their time; see above.")
        raise StageFailed(f"{sum(map(bool, codes))} of {count} workers ended before their time; see above.")


def _devices(visible: str | None, at: int, count: int) -> dict[str, str]:
    """The GPUs of one worker: its share of those that are named, where there is one for each."""
    named = [one.strip() for one in (visible or "").split(",") if one.strip()]
    return {DEVICES: ",".join(named[at::count])} if len(named) >= count else {}


def _work_for(options: argparse.Namespace, sweep: Sweep, study: Study, store: Store) -> int:
    """What a worker does: trials, on its share of the cores, until its parent dies or none is left."""
    from dataclasses import replace

    from align.pipeline.stop_signal import die_with_parent

    parent, _, count = options.worker.partition("/")
    die_with_parent(int(parent))
    if sweep.base.config.runtime.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        sweep = replace(sweep, base=sweep.base.changed({"runtime.threads": max(1, cores // int(count))}))
    try:
        work_here(sweep, study, store, quiet=options.json, shown=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


# ---- what came of it ------------------------------------------------------------------------------------------------


def _try_page(sweep: Sweep, study: Study, store: Store, folder: Path | None) -> Path | None:
    """The page; an error in making it is said on standard error and changes nothing else."""
    from align.cli.sweep_page import write_page

    try:
        return write_page(sweep, study, store, folder)
    except Exception as error:  # whatever it is: the sweep's own outcome must reach the user
        from align.cli.console import printable

        print(printable(f"note: the page could not be written: {type(error).__name__}: {error}"), file=sys.stderr)
        return None


def _document(sweep: Sweep, study: Study, store: Store, page: Path | None) -> dict[str, Any]:
    """The sweep as one JSON document."""
    from align.sweep.summary import trial_rows

    return {
        "name": sweep.config.name,
        "store": str(store.root),
        "objectives": [{"name": one.name, "better": "higher" if one.higher else "lower"} for one in sweep.objectives],
        "best": study.best(),
        "trials": [vars(row) for row in trial_rows(sweep, study)],
        "page": None if page is None else str(page.resolve()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align sweep``."""
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep file, like pipelines/sweeps/kl.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be tried")
    parser.add_argument("--workers", type=int, metavar="N", help="trials at once, each a process")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all, instead of the file's")
    parser.add_argument("--retry", action="store_true", help="run failed trials again, too")
    parser.add_argument("--fresh", action="store_true", help="begin anew; finished stages stay")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="override a field of the pipeline in every trial; may be given several times",
    )  # fmt: skip
    parser.add_argument("--on", choices=["here", "slurm", "ray"], default="here", help="what runs the trials")
    parser.add_argument("--detach", action="store_true", help="hand the trials to the cluster and come back")
    parser.add_argument("--worker", metavar="PARENT/COUNT", help=argparse.SUPPRESS)
    add_output(parser)
    add_store(parser)
