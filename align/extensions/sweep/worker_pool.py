"""The workers of a sweep: processes of this machine, or an array of Slurm jobs, or Ray tasks.

Every worker opens the same study in the store and runs trials until none is left (``SweepTask.run``). An executor only
starts workers and says how each has ended; ``run_workers`` follows them. ``on_cluster.py`` has the executors of
clusters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.clusters.follow import with_threads
from align.config.validation import validate_plain
from align.errors import StageFailed, UserError, printable
from align.extensions.sweep.config import SweepConfig
from align.extensions.sweep.plan import Sweep
from align.extensions.sweep.study import Study, Trial
from align.extensions.sweep.table import print_changes, print_trial
from align.extensions.sweep.worker import ListenerFactory, Worker
from align.pipeline.process_limits import usable_cores
from align.pipeline.stop_signal import Stopped, StopRequest, die_with_parent
from align.runner.listener import Listener
from align.runner.open_store import Opening
from align.store.store import Store

if TYPE_CHECKING:
    from align.pipeline.pipeline import Pipeline
    from align.runner.listener import ConsoleListener

INTERRUPTED = 130
DEVICES = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 1.0
STOPPED = "stopped as asked; finished trials and stages are kept. The same command continues."


@dataclass(frozen=True)
class SweepTask:
    """Arguments of a worker, as plain values that any machine can read."""

    config: dict[str, Any]
    """The sweep's file as parsed YAML."""
    where: str
    assignments: list[str]
    on: str | None
    store: dict[str, Any]
    """Fields of ``align.runner.open_store.Opening``."""
    base: str
    """The working folder of the command; relative paths start there."""

    @classmethod
    def of(cls, sweep: Sweep, store: Store, options: argparse.Namespace) -> SweepTask:
        """Return the task of every worker of a sweep."""
        config = sweep.config.model_dump(mode="json", exclude_unset=True)
        assignments = list(options.assignments)
        return cls(config, sweep.where, assignments, options.on, asdict(Opening.of(store)), str(Path.cwd()))

    def check(self) -> Sweep:
        """Return the sweep. Raises ``UserError`` if a file that it names has changed for the worse."""
        config = validate_plain(SweepConfig, self.config)
        return Sweep.check(config, self.where, self.assignments, self.on)

    def run(self, sweep: Sweep, stop: StopRequest, *, quiet: bool = True) -> None:
        """Run trials in this process until none is left."""
        store = Opening(**self.store).open()
        run_trials(sweep, Study.open(store, sweep), store, quiet=quiet, shows_stages=False, stop=stop)


@dataclass(frozen=True)
class WorkerEnd:
    """End of a worker: the exit code of its process, and the reason if it failed."""

    code: int = 0
    message: str = ""


class Workers(Protocol):
    """The running workers of a sweep."""

    every: float
    """Seconds between two calls of ``poll``."""

    def poll(self) -> list[WorkerEnd | None]:
        """Return the end of each worker; None for a worker that waits or runs."""

    def stop(self) -> None:
        """Ask the workers to stop at their next checkpoint."""

    def abandon(self) -> None:
        """End the workers, or leave them to a scheduler that outlives this command, which was interrupted."""


def run_workers(workers: Workers, sweep: Sweep, study: Study, *, quiet: bool) -> None:
    """Print trials that begin or end, until all workers have ended. Raises the error that ended a worker too early."""
    states = {trial.number: trial.state for trial in study.trials()}
    with StopRequest().handle_signals(signal.SIGUSR1) as stop:
        is_passed_on = False
        try:
            while True:
                ends = workers.poll()
                print_changes(sweep, study, states, quiet)
                over = [end for end in ends if end is not None]
                if len(over) == len(ends):
                    break
                if stop.is_requested and not is_passed_on:
                    # Interrupted trials continue later from their checkpoints.
                    workers.stop()
                    is_passed_on = True
                time.sleep(workers.every)
        except BaseException:
            workers.abandon()
            raise
        _raise_for(over, stop)


def _raise_for(ends: list[WorkerEnd], stop: StopRequest) -> None:
    failed = [end for end in ends if end.code not in (0, Stopped.exit_code)]
    if stop.is_requested or any(end.code == Stopped.exit_code for end in ends):
        raise Stopped(STOPPED)
    if not failed:
        return
    message = f"{len(failed)} of {len(ends)} workers failed: {failed[0].message}"
    if all(end.code == UserError.exit_code for end in failed):
        raise UserError(message)
    raise StageFailed(message)


# ---- trials in this process -----------------------------------------------------------------------------------------


def run_trials(
    sweep: Sweep, study: Study, store: Store, *, quiet: bool, shows_stages: bool, stop: StopRequest | None = None
) -> None:
    """Run trials in this process until none is left; ``shows_stages`` also prints a line per stage."""

    def log(trial: Trial, status: str) -> None:
        if not quiet:
            print_trial(sweep, study, trial, status)

    open_listener: ListenerFactory = _console_listener if shows_stages else _silent_listener
    Worker(sweep, study, store, open_listener, log, stop).run()


def _silent_listener(pipeline: Pipeline) -> contextlib.nullcontext[Listener]:
    return contextlib.nullcontext(Listener())


def _console_listener(pipeline: Pipeline) -> ConsoleListener:
    from align.runner.listener import ConsoleListener

    class TrialConsole(ConsoleListener):
        """Shows only stages that run; a stage that all trials share would be shown in each."""

        def stage_cached(self, node: Any, artifact: Any) -> None:
            """Show no line."""

    return TrialConsole(list(pipeline))


# ---- processes of this machine --------------------------------------------------------------------------------------


class ProcessWorkers:
    """Workers in processes of this machine, which share its cores and GPUs and end with this process."""

    every = POLL_SECONDS

    def __init__(self, task: SweepTask, count: int) -> None:
        command = [sys.executable, "-m", "align.extensions.sweep.worker_pool", str(os.getpid()), str(count)]
        self.processes: list[subprocess.Popen[str]] = []
        for number in range(count):
            environment = {**os.environ, **device_share(os.environ.get(DEVICES), number, count)}
            # In its own session a worker does not get Ctrl-C; this process ends it in order.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, start_new_session=True, text=True
            )
            self.processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stream:
                stream.write(json.dumps(asdict(task)))

    def poll(self) -> list[WorkerEnd | None]:
        """Return the end of each process, which has printed its error."""
        codes = [process.poll() for process in self.processes]
        return [None if code is None else WorkerEnd(code, "see above.") for code in codes]

    def stop(self) -> None:
        """Pass the signal on."""
        self._send(signal.SIGUSR1)

    def abandon(self) -> None:
        """Interrupt every worker and wait for it, so no lock is left behind."""
        self._send(signal.SIGINT)
        for process in self.processes:
            process.wait()

    def _send(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def device_share(visible: str | None, number: int, count: int) -> dict[str, str]:
    """Return the environment with one worker's share of the visible GPUs; empty if there are too few for all."""
    devices = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return {DEVICES: ",".join(devices[number::count])} if len(devices) >= count else {}


def main(parent: int, count: int) -> int:
    """Run one worker on a share of the cores, as the task on standard input says; returns the exit code."""
    die_with_parent(parent)
    with StopRequest().handle_signals(signal.SIGUSR1) as stop:
        try:
            task = SweepTask(**json.load(sys.stdin))
            sweep = task.check()
            if sweep.base.config.runtime.threads is None:
                # Otherwise every stage would use all cores, and the workers would slow each other down.
                threads = max(1, usable_cores() // count)
                sweep = replace(sweep, base=sweep.base.changed({"runtime.threads": threads}))
            task.run(sweep, stop)
        except (UserError, StageFailed, Stopped) as error:
            print("\n".join(printable(line) for line in str(error).splitlines()), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def with_cores(sweep: Sweep, cores: int | None) -> Sweep:
    """Return the sweep with a job's cores as threads of its stages."""
    return replace(sweep, base=with_threads(sweep.base, cores))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
