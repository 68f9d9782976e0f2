"""A process that has imported torch, transformers and trl, and forks the processes of stages from itself.

Those imports last five to seven seconds, and a run has them once for each stage that loads a model. Here it has them
once, during its first stage. ``python -m align.runner.fork_server SOCKET RUNNER THREADS MODULE...`` serves the process
RUNNER at the other end of the socket (``ForkServer``): it imports the modules, says ``ready``, then reads one message
per stage: its folder and the variables of its environment that are not the server's, with two file descriptors, the log
and a pipe. The stage's process writes ``pid NUMBER`` to the pipe, and the server adds ``exit CODE`` when it has ended.

Another message asks for a branch: a fork that also imports vLLM, and serves stages that sample at a second socket.
vLLM needs five seconds more, for which a stage that trains would only wait.

The server holds no model and no threads that work, so a fork loses no state. It ends if there is an
accelerator, whose driver does not survive a fork: ``stage_process.py`` then starts stages by the interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.pipeline.process_limits import relax_collections
from align.pipeline.stop_signal import die_with_parent
from align.runner import worker

READY = b"ready"
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


# ---- the server ----


def main(descriptor: int, runner: int, threads: int, modules: Sequence[str]) -> int:
    """Serve until the runner closes its end; in a forked process, run the stage and return its exit code.

    ``threads``: of each stage; 0 for this process's share of the cores.
    """
    die_with_parent(runner)
    with socket.socket(fileno=descriptor) as control:
        if not preload(threads, modules):
            return 0
        with contextlib.suppress(OSError):  # the runner has ended meanwhile
            control.sendall(READY)
        folder = serve(control)
    # In a fork, the stage begins only here: the loop of the server is left and its socket is closed.
    return 0 if folder is None else run_stage(folder)


def preload(threads: int, modules: Sequence[str]) -> bool:
    """Import what stages need; return whether a process with it can be forked."""
    worker.end_without_teardown()
    relax_collections()
    # Libraries read the number of threads when they are imported: it is the same for all stages of a server.
    worker.set_threads(threads)
    for name in modules:
        imported = importlib.import_module(name)
        if name == "torch" and imported.accelerator.is_available():
            return False
    # Objects that are never walked again stay in memory pages that all forks share.
    gc.collect()
    gc.freeze()
    return True


def serve(control: socket.socket) -> str | None:
    """Fork a process per message; return its folder in that process, and None here once the runner is gone."""
    statuses: dict[int, int] = {}  # descriptor of a process (pidfd) -> its pipe to the runner
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                # 1. A stage's process has ended: pass its exit code on.
                if key.fd in statuses:
                    selector.unregister(key.fd)
                    _report_end(key.fd, statuses.pop(key.fd), key.data)
                    continue
                # 2. A message is one process to fork. An empty message says that the runner has closed its end.
                message, descriptors, _, _ = socket.recv_fds(control, 65536, 2)
                if not message:
                    return None
                order = json.loads(message)
                server = os.getpid()
                pid = os.fork()
                if pid == 0:
                    # First of all, because for the runner the end of the server is also the end of the stage.
                    die_with_parent(server)
                    # The server's files are closed, so processes that wait for its end notice it.
                    for handle in (*statuses, *statuses.values()):
                        os.close(handle)
                    if "branch" in order:
                        control.close()
                        return _serve_branch(socket.socket(fileno=descriptors[0]), order["branch"])
                    _become_stage(descriptors[0], descriptors[1], order["environment"])
                    return str(order["folder"])
                if "branch" in order:
                    # The branch has the socket now, and ends once the runner closes its end. No process waits for it.
                    os.close(descriptors[0])
                    continue
                # 3. The log is the stage's. The pipe stays open here for the exit code.
                log, status = descriptors
                os.close(log)
                # A pidfd is readable once its process has ended, so one select waits for runner and stages.
                process = os.pidfd_open(pid)
                statuses[process] = status
                selector.register(process, selectors.EVENT_READ, pid)


def _serve_branch(control: socket.socket, importer: str) -> str | None:
    """Call ``importer`` (``module:name``), then serve the runner at another socket as ``serve`` does."""
    module, _, name = importer.partition(":")
    with control:
        try:
            getattr(importlib.import_module(module), name)()
        except Exception:  # it is never ready: a stage that imports vLLM itself says what is wrong
            return None
        gc.collect()
        gc.freeze()
        with contextlib.suppress(OSError):  # the runner has ended meanwhile
            control.sendall(READY)
        return serve(control)


def _report_end(process: int, status: int, pid: int) -> None:
    """Write the exit code of a process that has ended: negative for a signal, as in ``subprocess``."""
    _, code = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the runner no longer asks
        os.write(status, f"exit {os.waitstatus_to_exitcode(code)}\n".encode())
    os.close(process)
    os.close(status)


def _become_stage(log: int, status: int, environment: dict[str, str | None]) -> None:
    """Lead a session of this process's own, as a stage's process does, and write to its log."""
    os.setsid()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # Only now: a runner that knows the id may signal the process group.
    os.write(status, f"pid {os.getpid()}\n".encode())
    os.close(status)


def run_stage(folder: str) -> int:
    """Run the stage laid out in ``folder`` as ``python -m align.runner.worker FOLDER`` does."""
    sys.argv = [str(Path(worker.__file__)), folder]
    with contextlib.suppress(ImportError):  # it comes with vLLM
        # ``ps`` and ``pgrep`` tell stages apart by their folder.
        importlib.import_module("setproctitle").setproctitle(f"python -m align.runner.worker {folder}")
    # Where the server has ended meanwhile, this process has as well.
    return worker.start([folder], parent=os.getppid())


# ---- the runner's side ----


class Channel:
    """This process's end of the socket to a process that forks stages."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self._ready = False

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
        self.environment = dict(environment)
        self.threads = threads
        self.folder = Path.cwd()
        self.owner = os.getpid()
        self.start = time.monotonic()
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
        """Return the variables that the server has otherwise, with their values; None for a variable to be removed."""
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
        self.reader = reader
        self.pid = pid
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


if __name__ == "__main__":
    numbers = sys.argv[1:4]
    modules = sys.argv[4:]
    sys.exit(main(int(numbers[0]), int(numbers[1]), int(numbers[2]), modules))
