"""Environments in separate processes, seen from the stage's process. Torch-free.

``process_server.py`` runs on the other side.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from align.environments import process_server as remote
from align.environments.environment import EnvironmentSource
from align.environments.results import EnvironmentFailed

START_SECONDS = 120.0
"""Time limit for the import of a user's module."""


class ProcessServer:
    """The process from which the processes of episodes are forked. It is started again if it dies."""

    def __init__(self, source: EnvironmentSource) -> None:
        """Start the process and wait for its imports. Raises ``EnvironmentFailed``."""
        self._source = source
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0
        """Number of episodes that had a process; also the number of the last of them."""
        self._start()

    def start_episode(self) -> EpisodeProcess:
        """Return a new process. Raises ``EnvironmentFailed``."""
        with self._lock:
            if self._control is None:
                self._start()
            assert self._control is not None
            self._started += 1
            ours, theirs = socket.socketpair()
            # The forked process gets a copy of `theirs`. The original is closed, so the connection ends with the copy.
            with theirs:
                try:
                    command = remote.COMMAND.pack(remote.FORK, self._started)
                    socket.send_fds(self._control, [command], [theirs.fileno()])
                except OSError:
                    ours.close()
                    self._stop()
                    raise EnvironmentFailed("the process of the environments died.") from None
            return EpisodeProcess(self, self._started, ours)

    def end_episode(self, number: int, *, is_ending: bool = False) -> int | None:
        """Kill an episode's process and its descendants; return its exit status, None if it is unknown.

        ``is_ending``: the process is about to end by itself.
        """
        command = remote.REAP if is_ending else remote.KILL
        with self._lock:
            if self._control is None:
                return None
            try:
                self._control.sendall(remote.COMMAND.pack(command, number))
                return int(remote.STATUS.unpack(self._control.recv(remote.STATUS.size, socket.MSG_WAITALL))[0])
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
            # The server finds modules where this process finds them, and its environment variables stay the same.
            program = f"import sys; sys.path[:] = {sys.path!r}; import align.environments.process_server as s; s.main()"
            # In a separate session, Ctrl-C ends only the stage, which then closes the socket.
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = ours
        try:
            ours.settimeout(START_SECONDS)
            remote.send(ours, remote.encode_source(self._source))
            problem = remote.receive(ours).decode()
            ours.settimeout(None)
        except remote.Disconnected as error:
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
    """The process of one episode; an ``Instance``."""

    def __init__(self, server: ProcessServer, number: int, connection: socket.socket) -> None:
        self._server = server
        self._number = number
        self._connection = connection
        self._lock = threading.Lock()
        self.is_ended = False

    def perform(self, method: str, inputs: tuple[Any, ...]) -> Any:
        """Return the result of a method. Raises ``ToolError``, and ``EnvironmentFailed`` also for a dead process."""
        try:
            remote.send(self._connection, remote.encode_request(method, inputs))
            content = remote.receive(self._connection)
        except remote.Disconnected:
            status = _describe(self.end(is_ending=True))
            raise EnvironmentFailed(f"the environment's process died{status} in `{method}`.") from None
        return remote.decode_answer(method, content)

    def end(self, *, is_ending: bool = False) -> int | None:
        """Kill the process and its descendants. A call in another thread raises ``EnvironmentFailed``.

        ``is_ending``: the process is about to end by itself.
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
    """Return a process's exit status in brackets; empty if it is unknown."""
    if status is None:
        return ""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f" ({signal.Signals(-status).name})"
    return f" (exit code {status})"
