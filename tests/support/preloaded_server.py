"""A Python that has imported torch, transformers and trl: its processes are forked from a server that has.

The processes of pytest-xdist, and the fork servers of their stages, all need these libraries. To import them takes 8 s
of CPU, and twice that on a clean clone, where nothing is compiled yet. Here one process imports them for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.pipeline.stop_signal import die_with_parent
from align.runner import fork_server, worker
from align.runner.fork_server import PRELOADED

CLIENT = Path(__file__).with_name("preloaded_python.py")
MOST_DESCRIPTORS = 64
"""Of one process, and connections that may wait for an answer."""


class PreloadedPython:
    """A running server. Its forks end with it, and it ends with the thread that has started it."""

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        # A socket's path has 107 bytes at most, which a user's folder for temporary files may have alone.
        self.folder = Path(tempfile.mkdtemp(prefix="align-tests-", dir="/tmp"))
        self.address = str(self.folder / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            # Commands may connect at once, and are answered when the imports are done.
            listener.bind(self.address)
            listener.listen(MOST_DESCRIPTORS)
            # An import that fails shows in the forks: without a server they are interpreters, which import the same.
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno()), str(os.getpid()), *modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )

    def close(self) -> None:
        """End the server and its forks."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def preloaded_command(address: str, inherited: Sequence[int] = ()) -> list[str]:
    """Return what stands for ``sys.executable`` in a command; ``inherited``: descriptors that its process gets."""
    return [sys.executable, "-S", "-s", str(CLIENT), address, str(len(inherited)), *map(str, inherited)]


def main(listener: socket.socket, parent: int, modules: Sequence[str]) -> int:
    """Serve until the parent ends; in a fork, run what was asked for."""
    die_with_parent(parent)
    if not fork_server.preload(1, modules):
        return 0
    order, descriptors = serve(listener)
    # A fork, which has left the loop of the server and has closed its sockets.
    become_process(order, descriptors)
    return run_python(order["arguments"])


def serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a process per connection, for ever; return its order and its descriptors in that process."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                # 1. A fork has ended: pass its exit code on.
                if key.fileobj is not listener:
                    selector.unregister(key.fileobj)
                    _report_end(key.fd, *key.data)
                    continue
                # 2. A connection is one process to fork.
                connection, _ = listener.accept()
                message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, MOST_DESCRIPTORS)
                if not message:  # the command was ended
                    connection.close()
                    continue
                # Before the fork: a command that reads the fork's output must not see the server end without an answer.
                _answer(connection, "started")
                server = os.getpid()
                pid = os.fork()
                if pid == 0:
                    die_with_parent(server)
                    _close_all(selector, listener, connection)
                    return json.loads(message), descriptors
                # 3. The descriptors are the fork's alone. A pidfd is readable once it has ended.
                for descriptor in descriptors:
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def _report_end(process: int, pid: int, connection: socket.socket) -> None:
    """Answer with the exit code: negative for a signal, as in ``subprocess``."""
    _, status = os.waitpid(pid, 0)
    _answer(connection, str(os.waitstatus_to_exitcode(status)))
    connection.close()
    os.close(process)


def _answer(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody waits any more
        connection.send(text.encode())


def _close_all(selector: selectors.BaseSelector, listener: socket.socket, connection: socket.socket) -> None:
    """Close what is the server's: those at the other ends wait for it to be closed."""
    for key in list(selector.get_map().values()):
        if key.fileobj is not listener:
            os.close(key.fd)
            key.data[1].close()
    listener.close()
    connection.close()


def become_process(order: dict[str, Any], descriptors: list[int]) -> None:
    """Take over the streams, the environment and the folder of a command."""
    # All of them first move beyond every number that is wanted: a number that one has may be another's, or its own.
    beyond = max(order["descriptors"]) + 1
    waiting = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, beyond) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(waiting, order["descriptors"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])


def run_python(arguments: list[str]) -> int:
    """Run ``-c CODE`` or ``-m MODULE ARGUMENTS...`` as the interpreter does; return the exit code."""
    # Lines are written at once here, which is all that -u is for.
    option, target, *words = [argument for argument in arguments if argument != "-u"]
    sys.argv = [option, *words]
    # The exit code after an exception. The process ends right after its exit handlers (align.runner.worker).
    worker._exit_codes.append(1)
    code: Any = 0
    try:
        if option == "-m":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(target, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):  # a message, which the interpreter prints
            raise
    worker._exit_codes.append(code)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:]))
