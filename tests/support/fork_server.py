"""The fork server of a test process: it forks stages, with any number of threads, and modules that tests run.

The libraries take some 8 s of CPU to import, which every process that a test starts by the interpreter would spend.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from align.pipeline.stop_signal import die_with_parent
from align.runner import fork_server, worker
from align.runner.fork_server import PASSED_ON, PRELOADED, Channel, ForkedProcess, ForkServer
from align.runner.stage_process import StageProcess, stage_environment
from tests.support.environment import beginning_environment
from tests.support.preloaded_server import preloaded_command

THREADS, COMMAND = "ALIGN_TEST_THREADS", "ALIGN_TEST_COMMAND"
"""Variables of a fork: the threads of a stage, and the module that runs in place of one, with its arguments."""
TORCH_FREE = ("align.runner.worker", "align.checks.stage")
"""Modules of every stage's process, the preparation of models left out."""


class TestForkServer(ForkServer):
    """A server that is ready, and that serves stages of any number of threads."""

    __test__ = False
    module = "tests.support.fork_server"
    passed_on = (*PASSED_ON, "PYTHONPATH", "AWS_")

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        super().__init__({**worker.ENVIRONMENT, **beginning_environment()}, 1, modules)
        self.wanted: int | None = None

    @staticmethod
    def python(descriptor: int) -> list[str]:
        """Return the interpreter, or what stands for it where pytest has several processes."""
        return preloaded_command(_preloaded[0], [descriptor]) if _preloaded else [sys.executable]

    def wait(self) -> bool:
        """Wait until it is ready: what starts before would import the libraries beside it.

        False where it has ended, as it does beside an accelerator.
        """
        return wait_for_channel(self.channel)

    def serves(self, command: list[str], environment: Mapping[str, str], threads: int | None) -> bool:
        """Return whether a fork would be the process that ``command`` starts."""
        self.wanted = threads
        return super().serves(command, environment, self.threads)

    def wait_for_branch(self) -> None:
        """Wait until the branch with vLLM is ready; the first call asks for it."""
        if self.branch is None:
            self.start_branch()
        assert self.branch is not None
        is_usable = wait_for_channel(self.branch) or importlib.util.find_spec("vllm") is None
        assert is_usable, "align.inference.vllm.import_engine failed in the branch"

    def fork(
        self, folder: str, environment: Mapping[str, str], log: int, *, vllm: bool = False
    ) -> ForkedProcess | None:
        """Fork the process of the stage in ``folder``."""
        if vllm:
            self.wait_for_branch()
        return super().fork(folder, {**environment, THREADS: str(self.wanted or 0)}, log, vllm=vllm)

    def fork_module(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        *,
        folder: Path | None = None,
        vllm: bool = False,
    ) -> ForkedProcess:
        """Fork the process of a module with its arguments, in another folder than this one where that is given."""
        if vllm:
            self.wait_for_branch()
        order = json.dumps([str(folder or ""), *command])
        forked = super().fork("", {**environment, COMMAND: order}, output, vllm=vllm)
        assert forked is not None, "the fork server has ended"
        return forked


def wait_for_channel(channel: Channel) -> bool:
    """Wait until the process at the other end is ready; False where it has ended."""
    if not channel.is_ready():
        select.select([channel.control], [], [], 120)
    return channel.is_ready()


_preloaded: list[str] = []
"""Address of the Python that has imported the libraries already, in a process of pytest-xdist."""
_servers: list[TestForkServer] = []
"""That of this process, once something was forked."""


def use_preloaded(address: str) -> None:
    """Fork the servers of this process from a Python that has imported the libraries already."""
    _preloaded[:] = [address]


def shared_server() -> TestForkServer:
    """Return the server of this process, which the first call starts."""
    if _servers and _servers[0].process.poll() is not None:
        close_shared_servers()
    if not _servers:
        _servers.append(TestForkServer())
    _servers[0].wait()
    return _servers[0]


@functools.cache
def server_without_torch() -> TestForkServer:
    """Return the server of stages that load no model, which the first call starts."""
    server = TestForkServer(TORCH_FREE)
    server.wait()
    return server


def close_shared_servers() -> None:
    """End them and their forks."""
    while _servers:
        _servers.pop().close()
    if server_without_torch.cache_info().currsize:
        server_without_torch().close()
        server_without_torch.cache_clear()


def start_module(
    module: str, arguments: Sequence[str], output: Path, *, vllm: bool = False, **variables: str
) -> StageProcess:
    """Start ``python -m module arguments``, whose output goes to the file ``output``.

    ``variables`` are those of its environment that are not this process's. The libraries, with ``vllm`` also that, are
    imported already when they are set.
    """
    environment = stage_environment() | variables
    with output.open("ab") as log:
        if ForkServer.is_possible() and shared_server().wait():
            return shared_server().fork_module([module, *arguments], environment, log.fileno(), vllm=vllm)
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


class Forked:
    """A forked module as ``subprocess.Popen`` shows it."""

    def __init__(self, process: ForkedProcess) -> None:
        self.pid, self.poll, self.wait, self.process = process.pid, process.poll, process.wait, process

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Forking:
    """Stands in for ``subprocess`` in a module of align's that starts ``python -m MODULE``, which is forked here."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, vllm: bool = False) -> None:
        self.vllm = vllm

    def Popen(self, command: list[str], stdout: IO[bytes], **options: Any) -> Any:
        """Start the module of ``command``, which the interpreter starts where nothing can be forked."""
        if not ForkServer.is_possible() or not shared_server().wait():
            return subprocess.Popen(command, stdout=stdout, **{"stderr": subprocess.STDOUT, **options})
        environment = options.get("env") or os.environ
        assert command[0] == sys.executable and "-m" in command
        process = shared_server().fork_module(
            command[command.index("-m") + 1 :], environment, stdout.fileno(), folder=options.get("cwd"), vllm=self.vllm
        )
        return Forked(process)

    def run(self, command: list[str], stdout: IO[bytes] | None = None, **options: Any) -> Any:
        """Run the module of ``command`` to its end; without ``stdout`` its output is the result's ``stderr``."""
        assert not options.pop("check", False)
        timeout = options.pop("timeout", None)
        # The log takes both streams.
        for option in ("capture_output", "text", "errors"):
            options.pop(option, None)
        with tempfile.TemporaryFile() as log:
            process = self.Popen(command, stdout or log, **options)
            process.wait(timeout)
            log.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, "", log.read().decode())


def main(descriptor: int, runner: int, threads: int, modules: Sequence[str]) -> int:
    """Serve until the test process closes its end; in a fork, run the stage or the module."""
    # A fork of the preloaded Python has that for its parent, and ends when the test process closes its end.
    if os.getppid() == runner:
        die_with_parent(runner)
    control = socket.socket(fileno=descriptor)
    return serve(control) if fork_server.preload(threads, modules) else 0


def serve(control: socket.socket) -> int:
    """Fork what is asked for at the other end; return the exit code of this server, or of the fork."""
    with control:
        control.sendall(fork_server.READY)
        folder = fork_server.serve(control)
    if folder is None:
        return 0
    # As the interpreter would have found it.
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    command = os.environ.pop(COMMAND, None)
    if command is not None:
        folder, module, *arguments = json.loads(command)
        if folder:
            os.chdir(folder)
            sys.path.insert(0, folder)
        sys.argv[1:] = arguments
        # It ends as a stage's process does: taking down the interpreter would copy all memory that the server shares.
        worker._exit_codes.append(1)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit:
            worker._exit_codes.clear()
            raise
        worker._exit_codes.append(0)
        return 0
    worker.set_threads(int(os.environ.pop(THREADS)) or None)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return fork_server.run_stage(folder)


if __name__ == "__main__":
    numbers, modules = sys.argv[1:4], sys.argv[4:]
    sys.exit(main(int(numbers[0]), int(numbers[1]), int(numbers[2]), modules))
