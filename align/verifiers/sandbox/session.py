"""Isolated processes: messages with limits of time and size, and the processes that the calls of a program share."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from align.errors import StageFailed, shorten

START_SECONDS = 120.0
"""Time until the limits are in force. It is not the program's."""
LINE = 1 << 16
CPU_EXIT = (-signal.SIGXCPU, 128 + signal.SIGXCPU)


class SandboxFailed(StageFailed):
    """The sandbox could not be started."""


class Session:
    """An isolated process and its descriptors. What it writes is hostile."""

    def __init__(self, process: subprocess.Popen[bytes], most_bytes: int, seconds: float) -> None:
        self.task: dict[str, Any] = {}
        """The limits, to which ``begin`` adds the work."""
        self._process = process
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._deadline = time.monotonic() + START_SECONDS
        self._pending = b""
        assert process.stdin is not None and process.stdout is not None
        self._input = process.stdin.fileno()
        self._output = process.stdout.fileno()
        # A program that does not read must not block this process. ``send`` waits until the deadline at most.
        os.set_blocking(self._input, False)

    def begin(self, work: dict[str, Any]) -> None:
        """Send the work and wait until the limits are in force; from then on the time of the program counts.

        Raises ``SandboxFailed``.
        """
        self.send(self.task | work)
        if self.receive() != {}:
            self.kill()
            assert self._process.stderr is not None
            reason = self._process.stderr.read(LINE).decode(errors="replace").strip().splitlines()[-1:]
            raise SandboxFailed(f"the sandbox did not start: {shorten(reason[0]) if reason else 'it ended silently'}.")
        self._deadline = time.monotonic() + self._seconds

    def send(self, message: dict[str, Any]) -> bool:
        """Write a message; return False if the process ended or did not read it in time."""
        content = memoryview(json.dumps(message).encode() + b"\n")
        while content:
            if not self._wait(self._input, select.POLLOUT):
                return False
            try:
                content = content[os.write(self._input, content[:LINE]) :]
            except OSError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if there is none in time, a longer one than allowed, or no JSON."""
        while b"\n" not in self._pending:
            if len(self._pending) > self._most_bytes or not self._read():
                return None
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def read_output(self) -> str | None:
        """Return all output of a program that ended with exit code 0 in time; None for any other."""
        while self._read():
            if len(self._pending) > self._most_bytes:
                self.kill()
                return None
        return self._pending.decode(errors="replace") if self.exit_code() == 0 else None

    def exit_code(self) -> int | None:
        """Return the exit code of a process that has closed its output; None if it did not end in time."""
        try:
            return self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    @property
    def is_over_time(self) -> bool:
        """True if the process has spent its wall-clock time or its processor time."""
        if time.monotonic() >= self._deadline:
            return True
        return self._process.poll() in CPU_EXIT

    def kill(self) -> None:
        """Kill the process with its group, and wait for its end."""
        # bubblewrap's death ends its process namespace.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def close(self) -> None:
        """Kill the process and close all its descriptors."""
        self.kill()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> bool:
        """Read some output; return False at its end or at the limit of time."""
        if not self._wait(self._output, select.POLLIN):
            return False
        content = os.read(self._output, LINE)
        self._pending += content
        return bool(content)

    def _wait(self, descriptor: int, event: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, event)
        remaining = self._deadline - time.monotonic()
        return remaining > 0 and bool(poll.poll(remaining * 1000))


class SeparateObjects(Exception):
    """A call needs objects of different processes."""


class Replicas:
    """Processes of one program, among which the calls of its functions alternate.

    A function that answers from what an earlier call stored, such as the argument of ``encode`` for the result of
    ``decode``, gives another result in a process that has not seen that call. An object of the program's class stays in
    the process that made it, and so do the calls of its methods. Tests see one number for each object.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._calls = 0

    def ask(self, request: dict[str, Any]) -> tuple[Session, dict[str, Any] | None]:
        """Return the process that a request went to, and its reply; None if there is none.

        Raises ``SeparateObjects``.
        """
        # Tests see the number ``own number * count + index of the process``, so its remainder tells which process has
        # the object.
        count = len(self._sessions)
        owners = {handle % count for handle in _handles(request)}
        if len(owners) > 1:
            raise SeparateObjects
        if owners:
            index = owners.pop()
        else:
            index = self._calls % count
            self._calls += 1
        session = self._sessions[index]
        reply = None
        if session.send(_renumber(request, lambda handle: handle // count)):
            reply = session.receive()
        try:
            return session, reply and _renumber(reply, lambda handle: handle * count + index)
        except RecursionError:
            return session, None


def _handles(data: Any) -> Iterator[int]:
    """Yield the numbers of the objects in a message."""
    if isinstance(data, dict):
        if isinstance(data.get("handle"), int):
            yield data["handle"]
        for value in data.values():
            yield from _handles(value)
    elif isinstance(data, list):
        for value in data:
            yield from _handles(value)


def _renumber(data: Any, number: Callable[[int], int]) -> Any:
    """Return a message whose objects have other numbers."""
    if isinstance(data, dict):
        return {
            key: number(value) if key == "handle" and isinstance(value, int) else _renumber(value, number)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_renumber(value, number) for value in data]
    return data
