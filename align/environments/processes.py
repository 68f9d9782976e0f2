"""Environments in processes of their own, as this process sees them. Torch-free.

``process_server.py`` is what runs there.
"""

from __future__ import annotations

import array
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from align.environments.environment import EnvironmentSource
from align.environments.errors import EnvironmentFailed
from align.environments.pipes import (
    Disconnected,
    decode_answer,
    encode_request,
    encode_source,
    receive,
    send,
)
from align.environments.process_server import COMMAND, FORK, KILL, REAP, STATUS

START_SECONDS = 120.0
"""Longest import of a user's module."""


class ProcessServer:
    """The process from which those of episodes are forked. It is started again if it dies."""

    def __init__(self, source: EnvironmentSource) -> None:
        """Start the process, which may take as long as its imports. Raises ``EnvironmentFailed``."""
        self._source = source
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0
        """How many episodes had a process; also the number of the last one."""
        self._start()

    def start_episode(self) -> EpisodeProcess:
        """Return a new process. Raises ``EnvironmentFailed``."""
        with self._lock:
            if self._control is None:
                self._start()
            assert self._control is not None
            self._started += 1
            ours, theirs = socket.socketpair()
            # The forked process gets a copy of `theirs`. This one is closed, so the connection ends with that process.
            with theirs:
                try:
                    # One message holds the command and the descriptor.
                    descriptors = array.array("i", [theirs.fileno()])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
                    self._control.sendmsg([COMMAND.pack(FORK, self._started)], ancillary)
                except OSError:
                    ours.close()
                    self._stop()
                    raise EnvironmentFailed("the process of the environments died.") from None
            return EpisodeProcess(self, self._started, ours)

    def end_episode(self, number: int, *, is_ending: bool = False) -> int | None:
        """Kill an episode's process, and what it started; return how it had ended, None where nobody knows.

        ``is_ending``: it is about to end by itself.
        """
        with self._lock:
            if self._control is None:
                return None
            try:
                self._control.sendall(COMMAND.pack(REAP if is_ending else KILL, number))
                return int(STATUS.unpack(self._control.recv(STATUS.size, socket.MSG_WAITALL))[0])
            except Exception:  # the server died, and its children with it
                self._stop()
                return None

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Modules are found where this process finds them; the environment's variables stay as they are.
            program = f"import sys; sys.path[:] = {sys.path!r}; import align.environments.process_server as s; s.main()"
            command = [sys.executable, "-c", program, str(theirs.fileno())]
            # A session of its own: Ctrl-C ends the stage, which then closes the socket.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = ours
        try:
            ours.settimeout(START_SECONDS)
            send(ours, encode_source(self._source))
            problem = receive(ours).decode()
            ours.settimeout(None)
        except Disconnected as error:
            problem = f"it ended, or took longer than {START_SECONDS:.0f} seconds to start ({error})."
        if problem:
            self._stop()
            raise EnvironmentFailed(f"the process of the environments did not start: {problem}")

    def _stop(self) -> None:
        if self._control is not None:
            # The server process ends when its socket closes, and its children end with it.
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class EpisodeProcess:
    """The process of one episode."""

    def __init__(self, server: ProcessServer, number: int, connection: socket.socket) -> None:
        self._server, self._number, self._connection = server, number, connection
        self._lock = threading.Lock()
        self.is_ended = False

    def perform(self, method: str, inputs: tuple[Any, ...]) -> Any:
        """Return the result of a method. Raises ``ToolError``, or ``EnvironmentFailed`` for a dead process, too."""
        try:
            send(self._connection, encode_request(method, inputs))
            content = receive(self._connection)
        except Disconnected:
            status = _describe(self.end(is_ending=True))
            raise EnvironmentFailed(f"the environment's process died{status} in `{method}`.") from None
        return decode_answer(method, content)

    def end(self, *, is_ending: bool = False) -> int | None:
        """Kill the process, and what it started. A call in another thread raises ``EnvironmentFailed``.

        ``is_ending``: it is about to end by itself.
        """
        with self._lock:
            if self.is_ended:
                return None
            self.is_ended = True
        status = self._server.end_episode(self._number, is_ending=is_ending)
        with contextlib.suppress(OSError):
            # This wakes the thread that waits in perform().
            self._connection.shutdown(socket.SHUT_RDWR)
        return status


def _describe(status: int | None) -> str:
    """Return how a process ended, in brackets."""
    if status is None:
        return ""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f" ({signal.Signals(-status).name})"
    return f" (exit code {status})"
