"""Start the process of a stage: by the interpreter, or by a fork of a process with its imports. Never imports torch.

``ForkServer`` is this side of ``fork_server.py``. It is started with a run's first stage, for the stages that follow. A
stage is forked if the server is ready, and has the very environment, folder and threads that the stage's process
would have. Anything else starts as ``python -m align.runner.worker FOLDER``, and comes to the same result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from align.pipeline.process_limits import claim_spinning
from align.runner.worker import ENVIRONMENT

OFF = "ALIGN_FORK_STAGES"
"""Variable of the environment that is 0 where every stage is started by the interpreter."""

PASSED_ON = ("ALIGN_", "PYTEST_")
"""Beginnings of variables that no library reads: a fork has them as its runner does, whatever the server has."""
PRELOADED = (
    "torch",
    "align.training.trainers",
    "align.training.stopping",
    "align.rl.trainer",
    "align.checks.stage",
    "align.inference.transformers",
)
"""Modules which, with what they import, are most of what a stage imports."""
VLLM = "align.inference.vllm:import_engine"
"""Function that imports what a stage which samples with vLLM imports on top."""

ANSWER_SECONDS = 20.0
"""Seconds that a server may need to fork a process."""
HEAD_START_SECONDS = 2.0
"""Seconds after its start from which a server has imported enough to be worth waiting for."""
IMPORT_SECONDS = 60.0
"""Seconds after its start from which a server that is not ready is no longer waited for."""


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
    return {**ENVIRONMENT, **this_thread.waiting, **os.environ}


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
            server, this_thread.server = this_thread.server, None
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


class Channel:
    """This process's end of the socket to a process that forks stages."""

    def __init__(self, control: socket.socket) -> None:
        self.control, self._ready = control, False

    def is_ready(self) -> bool:
        """Return whether the process has imported what stages need."""
        if not self._ready:
            # An empty answer says that the process has ended; it then never becomes ready.
            with contextlib.suppress(OSError):  # not yet, or not any more
                self._ready = bool(self.control.recv(64, socket.MSG_DONTWAIT))
        return self._ready

    def close(self) -> None:
        """Close this end, by which the process ends."""
        self._ready = False
        self.control.close()


class ForkServer:
    """A running fork server, and what it was started with.

    Its branch is a process that it has forked from itself and that has imported vLLM as well. Stages that sample are
    forked from the branch once it is ready, all others from the server.
    """

    module = "align.runner.fork_server"
    """The module that the server runs."""
    passed_on: tuple[str, ...] = PASSED_ON
    """Beginnings of variables in which a fork may differ from its server."""

    def __init__(self, environment: Mapping[str, str], threads: int | None, modules: Sequence[str] = PRELOADED) -> None:
        self.environment, self.threads, self.folder = dict(environment), threads, Path.cwd()
        self.owner, self.start = os.getpid(), time.monotonic()
        # Packets keep each message apart from the next one, and together with its file descriptors.
        control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(control)
        self.branch: Channel | None = None
        numbers = (far_end.fileno(), self.owner, threads or 0)
        # The far end is closed here once the server has its copy, so this end shows when the server is gone.
        with far_end:
            self.process = subprocess.Popen(
                [*self.python(far_end.fileno()), "-m", self.module, *map(str, numbers), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                pass_fds=[far_end.fileno()],
                start_new_session=True,
            )

    @staticmethod
    def python(descriptor: int) -> list[str]:
        """Return the interpreter of the server, to which ``descriptor`` is passed."""
        return [sys.executable]

    def start_branch(self) -> None:
        """Ask for the branch. The server forks it as soon as its own imports are done; this process does not wait."""
        control, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far_end, contextlib.suppress(OSError):  # the server has ended
            socket.send_fds(self.channel.control, [json.dumps({"branch": VLLM}).encode()], [far_end.fileno()])
        self.branch = Channel(control)

    @staticmethod
    def is_possible() -> bool:
        """Return whether this system can fork with libraries imported: Linux; macOS ends a process forked so."""
        if not sys.platform.startswith("linux") or os.environ.get(OFF) == "0":
            return False
        try:
            # Old kernels lack it, and some sandboxes refuse it.
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError):
            return False
        return True

    def serves(self, command: list[str], environment: Mapping[str, str], threads: int | None) -> bool:
        """Return whether a fork would be the process that ``command`` starts, and the server is ready."""
        return self.suits(command, environment, threads) and self.channel.is_ready()

    def suits(self, command: list[str], environment: Mapping[str, str], threads: int | None) -> bool:
        """Return whether a fork would be the process that ``command`` starts, once the server is ready."""
        if os.getpid() != self.owner:  # in a fork of the runner
            return False
        is_alike = threads == self.threads and self.folder == Path.cwd() and command[0] == sys.executable
        return is_alike and all(name.startswith(self.passed_on) for name in self._differences(environment))

    def _differences(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """Return the variables that the server has otherwise, with their values; None for one to be removed."""
        names = {*environment, *self.environment}
        return {name: environment.get(name) for name in names if environment.get(name) != self.environment.get(name)}

    def fork(
        self, folder: str, environment: Mapping[str, str], log: int, *, vllm: bool = False
    ) -> ForkedProcess | None:
        """Fork the process of the stage in ``folder``; None if the server has ended or does not answer.

        ``vllm``: from the branch, where that is ready.
        """
        channel = self.channel
        if vllm and self.branch is not None and self.branch.is_ready():
            channel = self.branch
        message = json.dumps({"folder": folder, "environment": self._differences(environment)})
        reader, writer = os.pipe()
        try:
            socket.send_fds(channel.control, [message.encode()], [log, writer])
        except OSError:
            os.close(reader)
            return None
        finally:
            # Without a copy here, the end of the pipe tells that the server is gone, and its stage with it.
            os.close(writer)
        process = ForkedProcess.accept(reader)
        if process is None:
            # It may answer yet, and a stage must not have two processes.
            self.close()
        return process

    def close(self) -> None:
        """End the server and its branch, and wait until it has ended; stages that still run end with them."""
        for channel in (self.channel, self.branch):
            if channel is not None:
                channel.close()
        # Closing ends a server that waits for messages; a server that still imports does not look at its socket.
        self.process.kill()
        self.process.wait()


class ForkedProcess:
    """A stage's process that a server has forked; ``reader`` is the pipe through which its exit code comes."""

    def __init__(self, reader: int, pid: int) -> None:
        self.reader, self.pid = reader, pid
        self.returncode: int | None = None
        os.set_blocking(reader, False)

    @classmethod
    def accept(cls, reader: int) -> ForkedProcess | None:
        """Wait for the process's id; None if the server, or the process itself, ended before it was told.

        The same for a server that does not answer within ``ANSWER_SECONDS``.
        """
        line = b""
        # Byte by byte: what follows the first line is the exit code, for later.
        while not line.endswith(b"\n"):
            if not select.select([reader], [], [], ANSWER_SECONDS)[0]:
                break
            data = os.read(reader, 1)
            if not data:
                break
            line += data
        label, _, number = line.decode().partition(" ")
        if label != "pid":
            os.close(reader)
            return None
        return cls(reader, int(number))

    def poll(self) -> int | None:
        """Look whether the process has ended, and return its exit code.

        A process whose server died has died with it, by the same signal.
        """
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                line = os.read(self.reader, 64)
                self.returncode = int(line.split()[1]) if line else -signal.SIGKILL
                os.close(self.reader)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"stage's process {self.pid}", timeout or 0.0)
            time.sleep(0.02)
        return code


class _ThisThread(threading.local):
    """State of one thread of a runner."""

    server: ForkServer | None = None
    """The server from which its stages are forked."""
    waiting: Mapping[str, str] = MappingProxyType({})
    """Variables that say how the threads of its stages wait (``process_limits``)."""


this_thread = _ThisThread()
