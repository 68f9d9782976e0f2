"""The process of a stage: started, followed until it ends, and the time that it took. Never imports torch.

A stage is forked if the fork server is ready, and has the very environment, folder and threads that the stage's process
would have. Anything else starts as ``python -m align.runner.worker FOLDER``, with the same result. ``run_stage.py`` has
what an attempt is given, and what becomes of its result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from align.config.runtime import Runtime
from align.config.runtime.launch import BY_SRUN
from align.errors import disk_is_full, no_space
from align.pipeline.process_limits import claim_spinning
from align.pipeline.registry import find_stage
from align.pipeline.stop_signal import CAN_STOP, Stopped, StopRequest, request_stop
from align.runner.fork_server import ForkServer
from align.runner.huge_pages import page_environment
from align.runner.stage_result import RESULT, read_attempts, read_result, read_work, write_attempts
from align.runner.worker import ENVIRONMENT, UNREACHABLE_CODE
from align.store.artifacts import EVENTS, LOG
from align.store.json_files import DamagedFile, parse_event
from align.store.retry import UNREACHABLE, UNREACHABLE_STORE, Retry

HEAD_START_SECONDS = 2.0
"""Seconds after its start from which a server has imported enough to be worth waiting for."""
IMPORT_SECONDS = 60.0
"""Seconds after its start from which a server that is not ready is no longer waited for."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
KEEP_SECONDS = 1.0
"""Seconds between two notes of an attempt's time: what is lost of it when the runner itself is killed."""
LOG_BYTES = 16 * 2**20
LOG_KEPT = 4 * 2**20
"""Most bytes of a stage's log, and the bytes that are kept of its start and of its end if it is longer."""
LOG_CUT = b"\n--- Output is left out here: a log of more than 16 MiB keeps its first and its last 4 MiB.\n"
NO_OUTPUT_CODE = 120
"""Python's exit code if the last of its output, here the log, could not be written."""


def run_attempt(
    name: str,
    partial: Path,
    follow: Callable[[dict[str, Any]], None],
    stop: StopRequest,
    *,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda how: None,
    retry: Retry | None = None,
) -> dict[str, Any]:
    """Start the process of the stage laid out in ``partial``; returns its result once it has ended, however it did.

    ``follow`` gets every line of the stage's event file. An interrupt (or SIGTERM, unless ``stop`` handles it) ends the
    process, then is raised; so does what ``check`` raises, which is asked all the while. When ``stop`` is asked for,
    the stage is asked in turn; a stage that exceeds its patience is ended, which raises ``Stopped``. ``tell`` is
    told at once how the stage stops. ``retry`` is for a folder that does not answer.
    """
    retry = retry or Retry(partial)
    environment = stage_environment()
    command, work = retry.call(lambda: (_command(partial, environment), read_work(partial)))
    stage = find_stage(work.stage)
    threads = work.runtime.get("threads")
    vllm = stage.samples and Runtime.model_validate(work.runtime).may_open_vllm
    if stage.estimator is not None:
        with _ended_in_order(stop, tell):
            # A process from which the stage can be forked imports what the stage would import itself.
            while is_importing(command, environment, threads) and not stop.is_requested:
                check()
                time.sleep(POLL_SECONDS)
    # Before the process starts: the tail begins after an earlier attempt's events.
    events, spent = retry.call(lambda: (Tail(partial / EVENTS), _Spent(partial)))
    output = retry.call(lambda: _open_log(partial, name))
    process = start_stage(command, environment, threads, output, vllm=vllm)
    with contextlib.suppress(OSError):  # the process has it; if the folder is away even closing fails
        os.close(output)
    try:
        can_stop = False
        is_passed_on = False
        with _ended_in_order(stop, tell), stop.handle_ctrl_c(lambda: can_stop):
            # One loop does it all: watch the locks, pass on a stop, forward events, note the time.
            while process.poll() is None:
                check()
                if stop.is_requested and not is_passed_on:
                    with contextlib.suppress(OSError):  # asked again until the folder is back
                        request_stop(partial)
                        is_passed_on = True
                        tell(_how_it_stops(stop, can_stop))
                if stop.is_over:
                    raise Stopped("asked to stop, and ended since it took too long to do so.")
                for event in events.read():
                    can_stop = can_stop or event["event"] == CAN_STOP
                    follow(event)
                spent.note()
                shorten_log(partial / LOG)
                time.sleep(POLL_SECONDS)
            # Events that were written between the last look and the end of the process.
            for event in events.read():
                follow(event)
    except BaseException:
        # Also for an error of ``check`` or ``follow``: no process may work on without a runner that holds its lock.
        _stop(process)
        raise
    finally:
        spent.note(at_once=True)
        shorten_log(partial / LOG)
    return retry.call(lambda: _result(partial, process.returncode))


def _open_log(partial: Path, name: str) -> int:
    handle = os.open(partial / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(handle, f"--- {datetime.now(UTC).isoformat(timespec='seconds')} {name}\n".encode())
    return handle


def shorten_log(log: Path) -> None:
    """Cut the middle out of a log that is too long: a tool or a reward may print without end.

    Processes append to it meanwhile, so a line that is written at this moment may be lost.
    """
    with contextlib.suppress(OSError):  # the folder is away; the next call does it
        size = log.stat().st_size
        if size <= LOG_BYTES:
            return
        with log.open("r+b") as file:
            file.seek(size - LOG_KEPT)
            end = file.read(LOG_KEPT)
            file.seek(LOG_KEPT)
            file.write(LOG_CUT + end)
            file.truncate()


def _result(partial: Path, code: int) -> dict[str, Any]:
    """Return the result that a process with exit code ``code`` has left, or the result that its exit code implies."""
    try:
        return read_result(partial / RESULT).model_dump()
    except DamagedFile as error:
        return {"status": "failed", "message": f"{partial / RESULT}: damaged: it {error}. Run again to resume it."}
    except FileNotFoundError:
        if code in (UNREACHABLE_CODE, NO_OUTPUT_CODE):
            return {"status": UNREACHABLE_STORE, "message": "the store could not be reached, not even for the result."}
        # So full that not even the result could be written; the folder itself may be another run's by now.
        full = disk_is_full(partial.parent)
        return {"status": "failed", "message": no_space(partial) if full else _describe_exit(code)}


def _command(partial: Path, environment: dict[str, str]) -> list[str]:
    """Return the stage's command line; inside a job of Slurm, srun starts a stage on each of its nodes."""
    command = [sys.executable, "-m", "align.runner.worker", str(partial.resolve())]
    work = read_work(partial)
    nodes = int(work.runtime["launch"]["nodes"])
    # Outside a job with so many nodes the user starts the same command line on the others (docs/distributed.md).
    if nodes == 1 or not find_stage(work.stage).distributed or int(os.environ.get("SLURM_JOB_NUM_NODES") or 1) < nodes:
        return command
    # Under srun the stage's parent is Slurm's daemon; expecting this process it would exit (``die_with_parent``).
    environment[BY_SRUN] = "1"
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    if cores:  # srun does not use the job's cores by default
        options.append(f"--cpus-per-task={cores}")
    return ["srun", *options, *command]


class _Spent:
    """Notes the time of an attempt after the times of earlier attempts, killed and failed attempts included.

    All that an attempt took counts, work that was lost with it included: it was paid for. The time is noted every
    ``KEEP_SECONDS`` while the attempt runs, so a stage that is killed loses no time of it, and a runner that is killed
    with its stage loses no more than that.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.before = read_attempts(partial)
        self.start = time.monotonic()
        # The first note is due at once: an attempt that dies at its start also counts.
        self.noted = -KEEP_SECONDS

    def note(self, at_once: bool = False) -> None:
        """Write the time so far if it is due."""
        seconds = time.monotonic() - self.start
        if seconds - self.noted < KEEP_SECONDS and not at_once:
            return
        self.noted = seconds
        with contextlib.suppress(OSError):  # a disk without room for a few bytes is the stage's to report
            write_attempts(self.partial, [*self.before, round(seconds, 2)])


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL; often the system running out of memory). Run again to resume it."
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}. Run again to resume it."
    return f"its process ended with exit code {code} and left no result."


def _how_it_stops(stop: StopRequest, can_stop: bool) -> str:
    """Return the line about a request that was passed on to the stage."""
    if stop.is_interrupt:
        return "stopping after the current step; press Ctrl-C again to stop now"
    if can_stop:
        return "asked to stop: stops after the current step"
    return "asked to stop: stops after its next step, or at the end of this stage"


@contextlib.contextmanager
def _ended_in_order(stop: StopRequest, tell: Callable[[str], None]) -> Iterator[None]:
    """Let SIGTERM to the runner also end the stage, unless ``stop`` hears the signal itself; tell of an interrupt."""
    is_heard = signal.SIGTERM in stop.signals
    terminate: AbstractContextManager[None] = contextlib.nullcontext() if is_heard else _terminate_as_interrupt()
    with terminate:
        try:
            yield
        except KeyboardInterrupt:
            # The user is told first, because ending the process may last seconds.
            tell("stopping now; its checkpoints are kept")
            raise


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM to the runner like Ctrl-C."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: Python allows no handler there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(process: StageProcess) -> None:
    """End the stage's whole process group: politely, then not."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        # The process leads this group, so what it has started there gets the signal as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


class Tail:
    """Reads the complete lines that were added to an event file since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # An earlier attempt's events are history: they stay in the file, for the report, but are not shown again.
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """New events; a line still being written waits for the next call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            if error.errno not in UNREACHABLE:
                raise
            return []  # they are still there when the folder is back
        # Only complete lines count; the offset stays in front of a line that is still being written.
        end = data.rfind(b"\n") + 1
        self.offset += end
        events = []
        for line in data[:end].splitlines():
            event = parse_event(line)
            if event is not None:
                events.append(event)
        return events


# ---- starting it ----


class StageProcess(Protocol):
    """The part of ``subprocess.Popen`` that a runner uses."""

    pid: int

    @property
    def returncode(self) -> Any:
        """Exit code, negative for a signal; None while the process runs."""

    def poll(self) -> int | None:
        """Look whether the process has ended, and return its exit code."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""


def stage_environment() -> dict[str, str]:
    """Return the environment of a stage's process, unless a cluster adds to it."""
    return {**ENVIRONMENT, **page_environment(), **this_thread.waiting, **os.environ}


def start_stage(
    command: list[str], environment: dict[str, str], threads: int | None, log: int, *, vllm: bool = False
) -> StageProcess:
    """Start ``command``, whose last word is the stage's folder, with its output in the file ``log``.

    ``threads``: as of ``runtime.threads``; ``vllm``: whether the stage samples with vLLM. The process leads a new
    session: Ctrl-C reaches the runner only, which then ends the stage in order.
    """
    server = this_thread.server
    if server is not None and server.serves(command, environment, threads):
        forked = server.fork(command[-1], environment, log, vllm=vllm)
        if forked is not None:
            return forked
    # No server, or none whose fork would be the same process.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


@contextlib.contextmanager
def forked_stages(threads: int | None, *, vllm: bool = False) -> Iterator[None]:
    """Start stages by forks inside of this, if they have these ``threads``; a context inside another has no effect.

    ``vllm``: whether a stage among them may sample with vLLM.
    The server starts at once, and what starts before it is ready starts as ever, unless it asks ``is_importing`` and
    waits. It belongs only to this thread, since Linux ends it with the thread that has started it.
    """
    if this_thread.server is not None or not ForkServer.is_possible():
        yield
        return
    # The stages of this thread compute one after another, so they share one claim.
    with claim_spinning() as this_thread.waiting:
        # A machine that is short of processes can do without.
        with contextlib.suppress(OSError):
            this_thread.server = ForkServer(stage_environment(), threads)
            if vllm and importlib.util.find_spec("vllm") is not None:
                this_thread.server.start_branch()
        try:
            yield
        finally:
            server = this_thread.server
            this_thread.server = None
            this_thread.waiting = {}
            if server is not None:
                server.close()


def is_importing(command: list[str], environment: Mapping[str, str], threads: int | None) -> bool:
    """Return whether the stage can be forked sooner than a new process would have imported the same."""
    server = this_thread.server
    if server is None or not server.suits(command, environment, threads):
        return False
    if server.channel.is_ready() or server.process.poll() is not None:
        return False
    return HEAD_START_SECONDS < time.monotonic() - server.start < IMPORT_SECONDS


class _ThisThread(threading.local):
    """State of one thread of a runner."""

    server: ForkServer | None = None
    """The server from which its stages are forked."""
    waiting: Mapping[str, str] = MappingProxyType({})
    """Variables that say how the threads of its stages wait (``process_limits``)."""


this_thread = _ThisThread()
