"""The workers of a sweep on this machine: trials in this process, or in several processes of the same command.

``sweep_on_slurm.py`` and ``sweep_on_ray.py`` run the same trials in jobs and tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from align.errors import StageFailed, UserError
from align.pipeline.machine_limits import usable_cores
from align.pipeline.stop_signal import Stopped

if TYPE_CHECKING:
    from align.pipeline.pipeline import Pipeline
    from align.pipeline.stop_signal import StopRequest
    from align.runner.listener import Listener
    from align.store.store import Store
    from align.sweep.plan import Sweep
    from align.sweep.study import Study, Trial

INTERRUPTED = 130
DEVICES = "CUDA_VISIBLE_DEVICES"


def run_trials(
    sweep: Sweep, study: Study, store: Store, *, quiet: bool, shows_stages: bool, stop: StopRequest | None = None
) -> None:
    """Run trials in this process until none is left; ``shows_stages`` prints a line per stage as well."""
    from align.cli.sweep_table import print_trial
    from align.sweep.worker import Worker

    def log(trial: Trial, status: str) -> None:
        if not quiet:
            print_trial(sweep, study, trial, status)

    open_listener = _console_listener if shows_stages else _silent_listener
    Worker(sweep, study, store, open_listener, log, stop).run()


@contextlib.contextmanager
def _console_listener(pipeline: Pipeline) -> Iterator[Listener]:
    from align.runner.console import ConsoleListener

    class TrialConsole(ConsoleListener):
        """Shows only what runs: stages that all trials share would be shown in each."""

        def stage_cached(self, node: Any, artifact: Any) -> None:
            """Show nothing."""

    with TrialConsole(list(pipeline)) as listener:
        yield listener


@contextlib.contextmanager
def _silent_listener(pipeline: Pipeline) -> Iterator[Listener]:
    from align.runner.listener import Listener

    yield Listener()


# ---- several processes ----------------------------------------------------------------------------------------------


def start_workers(options: argparse.Namespace, count: int) -> None:
    """Run ``count`` processes of this command, each taking trials. Raises what ended them too early."""
    command = [sys.executable, "-m", "align.cli.main", "sweep", *_arguments(options)]
    command += ["--worker", f"{os.getpid()}/{count}"]
    processes = []
    for number in range(count):
        environment = {**os.environ, **device_share(os.environ.get(DEVICES), number, count)}
        # Each has a session of its own: Ctrl-C reaches only this process, which then ends them in order.
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    previous_handler = signal.signal(signal.SIGUSR1, pass_on)
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        # Interrupted: ask every worker to end in order, then wait, so that none is left behind with a lock.
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGUSR1, previous_handler)
    _raise_for(codes)


def _arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments of a worker's command line."""
    arguments = [options.sweep]
    for name in ("store", "trials", "on"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    for text in options.assignments:
        arguments += ["--set", text]
    if options.json:
        arguments.append("--json")
    return arguments


def _raise_for(codes: list[int]) -> None:
    """Raise the error that follows from the workers' exit codes. Each has printed its own on standard error."""
    if Stopped.exit_code in codes:
        raise Stopped("stopped as asked; finished trials and stages are kept. The same command continues.")
    failed = [code for code in codes if code]
    if not failed:
        return
    message = f"{len(failed)} of {len(codes)} workers failed; see above."
    if all(code == UserError.exit_code for code in failed):
        raise UserError(message)
    raise StageFailed(message)


def device_share(visible: str | None, number: int, count: int) -> dict[str, str]:
    """Return the environment with one worker's share of the visible GPUs; empty where there is not one for each."""
    devices = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return {DEVICES: ",".join(devices[number::count])} if len(devices) >= count else {}


def run_as_worker(options: argparse.Namespace, sweep: Sweep, study: Study, store: Store) -> int:
    """Run trials on a share of the cores, until the parent process dies or none is left; returns the exit code."""
    from dataclasses import replace

    from align.pipeline.stop_signal import die_with_parent

    parent, _, count = options.worker.partition("/")
    die_with_parent(int(parent))
    if sweep.base.config.runtime.threads is None:
        # Otherwise every stage would take all cores, and the workers would slow each other down.
        sweep = replace(sweep, base=sweep.base.changed({"runtime.threads": max(1, usable_cores() // int(count))}))
    try:
        run_trials(sweep, study, store, quiet=options.json, shows_stages=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
