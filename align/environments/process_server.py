"""The server process from which the processes of episodes are forked, and its messages. Torch-free.

It imports the user's module once and runs no thread, so a fork needs milliseconds and is safe. ``processes.py`` starts
it with a socket and sends the source of environments, then commands of nine bytes. ``F`` and a number forks a process
for an episode, which serves the descriptor that comes with the command. ``K`` and a number kills it; ``R`` lets it end
by itself first. Both are answered with its exit status. All processes die when the socket closes.

Messages are JSON, so reading one runs no code. A process group does not contain everything that a tool starts: a tool
may start a session or a daemon. So the server is the subreaper of its descendants, finds them in ``/proc`` and kills
them with the episode. This needs Linux; elsewhere only the group is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from align.environments.environment import Action, Environment, EnvironmentSource
from align.environments.results import ERRORS, EnvironmentFailed, Scores, Step, ToolError, describe_failure
from align.pipeline.stop_signal import die_with_parent

COMMAND = struct.Struct("!cQ")
FORK = b"F"
KILL = b"K"
REAP = b"R"
STATUS = struct.Struct("!i")
LAST_SECONDS = 2.0
"""Time for a process to end by itself after its connection is closed, so its exit status is known."""
LARGEST = 64 * 2**20
"""Bytes of the largest message."""
_LENGTH = struct.Struct("!Q")
FAILED = "failed"
RESULTS = {"step": Step, "score": Scores}
"""Methods whose result is not a JSON value, and its type."""
PR_SET_CHILD_SUBREAPER = 36
ROUNDS = 50
PAUSE = 0.01
"""Maximum number of searches for new processes, and the seconds between two: each may have started others."""


def main() -> None:
    """Serve the socket whose descriptor is the argument, until it closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        source = decode_source(receive(control))
        source.preload()
        send(control, b"")
    except Exception as error:
        send(control, describe_failure(error).encode())
        return
    _adopt_orphans()  # processes of an episode whose own process has died
    helpers = set(_children(os.getpid()))  # the user's module may have started some
    children: dict[int, int] = {}
    try:
        while True:
            content, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if len(content) < COMMAND.size:
                return
            command, number = COMMAND.unpack(content)
            if command == FORK:
                children[number] = _fork(source, control, descriptors[0])
            else:
                child = children.pop(number)
                if command == REAP:
                    _await_end(child)
                status = _kill(child)
                # Descendants of a dead process are now children of the server.
                _kill_children_except(helpers.union(children.values()))
                control.sendall(STATUS.pack(status))
    finally:
        for child in children.values():
            _kill(child)
        _kill_children_except(helpers)


def _fork(source: EnvironmentSource, control: socket.socket, descriptor: int) -> int:
    """Fork a process that serves the descriptor; return its id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    try:
        os.setsid()  # a separate group, with most processes that its tools start
        _adopt_orphans()  # daemons, which leave the group
        die_with_parent(parent)
        # With a copy of this socket open, the stage would not notice that the server has died.
        control.close()
        serve(source, socket.socket(fileno=descriptor))
    finally:
        os._exit(0)


def serve(source: EnvironmentSource, connection: socket.socket) -> None:
    """Make an instance and run its methods on request, until the other end closes the connection."""
    environment: Environment | None = None
    while True:
        try:
            method, inputs = decode_request(receive(connection))
        except Disconnected:
            return
        try:
            if environment is None:
                environment = source.make()
            answer = encode_result(getattr(environment, method)(*inputs))
        except (ToolError, EnvironmentFailed) as error:
            answer = encode_error(error)
        except Exception as error:
            answer = encode_error(EnvironmentFailed(describe_failure(error)))
        # The process ends by os._exit(), which does not flush buffers.
        sys.stdout.flush()
        send(connection, answer)


# ---- descendants ----


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so they are still found."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _await_end(child: int) -> None:
    """Wait up to ``LAST_SECONDS`` for a child to end, and leave its status to ``_kill``."""
    deadline = time.monotonic() + LAST_SECONDS
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def _kill(child: int) -> int:
    """Kill a child and all its descendants; return its exit status, ``-SIGKILL`` if it was still running."""
    # The id belongs to the child until it is waited for.
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        _kill_descendants(child)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if ended:
        return os.waitstatus_to_exitcode(status)
    _signal(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def _kill_descendants(pid: int) -> None:
    """Kill all descendants of a process, which is stopped first to start no more."""
    _signal(pid, signal.SIGSTOP)
    for _ in range(ROUNDS):
        below = _descendants(pid)
        if not below:
            return
        for child in below:
            _signal(child, signal.SIGKILL)
        time.sleep(PAUSE)


def _kill_children_except(spared: set[int]) -> None:
    """Kill all children of this process except ``spared``, with their descendants, and wait for them."""
    for child in set(_children(os.getpid())) - spared:
        _kill_descendants(child)
        _signal(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process that have not ended."""
    running = []
    queue = _children(pid)
    while queue:
        child = queue.pop()
        queue += _children(child)
        if not _has_ended(child):
            running.append(child)
    return running


def _children(pid: int) -> list[int]:
    """Return the ids of a process's children, including ended children that were not waited for."""
    # psutil reads every process of the machine for this, at each end of an episode.
    children: list[int] = []
    with contextlib.suppress(OSError):  # the process has ended, or the kernel does not list children
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                children += map(int, (thread / "children").read_text(encoding="ascii").split())
    return children


def _has_ended(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    # The name, in parentheses, may contain spaces. The state follows it.
    return stat.rpartition(") ")[2][:1] in ("Z", "X")


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


# ---- messages ----


class Disconnected(Exception):
    """The other end is gone."""


def send(connection: socket.socket, content: bytes) -> None:
    """Send a message. Raises ``Disconnected``."""
    try:
        connection.sendall(_LENGTH.pack(len(content)) + content)
    except OSError as error:
        raise Disconnected(str(error)) from None


def receive(connection: socket.socket) -> bytes:
    """Wait for a message. Raises ``Disconnected``, and ``EnvironmentFailed`` if the message is too large."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > LARGEST:
        raise EnvironmentFailed(f"the environment returned {length:,} bytes; return at most {LARGEST:,}.")
    return _read(connection, length)


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = connection.recv(min(count - len(parts), 1 << 20))
        except OSError as error:
            raise Disconnected(str(error)) from None
        if not part:
            raise Disconnected("the connection was closed")
        parts += part
    return bytes(parts)


def encode_source(source: EnvironmentSource) -> bytes:
    """Return a source for ``decode_source``: its class and its fields."""
    assert is_dataclass(source)
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return json.dumps({"module": type(source).__module__, "class": type(source).__name__, "fields": values}).encode()


def decode_source(content: bytes) -> EnvironmentSource:
    """Return the source of ``encode_source``."""
    message = json.loads(content)
    kind: type[EnvironmentSource] = getattr(importlib.import_module(message["module"]), message["class"])
    return kind(**message["fields"])


def encode_request(method: str, inputs: tuple[Any, ...]) -> bytes:
    """Return a call of a method for ``decode_request``. Raises ``EnvironmentFailed`` if a row is not JSON."""
    try:
        return json.dumps([method, *inputs]).encode()
    except (TypeError, ValueError) as error:
        raise EnvironmentFailed(
            f"a row holds what JSON cannot hold ({error}), and `isolation: process` sends rows as JSON."
        ) from None


def decode_request(content: bytes) -> tuple[str, list[Any]]:
    """Return the method and the arguments of ``encode_request``."""
    method, *inputs = json.loads(content)
    if method == "restore":
        inputs[1] = [Action(*action) for action in inputs[1]]
    return method, inputs


def encode_result(value: Any) -> bytes:
    """Return the result of a method for ``decode_answer``."""
    if isinstance(value, Step | Scores):
        value = asdict(value)
    return json.dumps({"result": value}).encode()


def encode_error(error: BaseException) -> bytes:
    """Return an exception for ``decode_answer``."""
    kind = error.kind if isinstance(error, ToolError) else FAILED
    return json.dumps({"error": kind, "text": str(error)}).encode()


def decode_answer(method: str, content: bytes) -> Any:
    """Return the result of a method, or raise its ``ToolError`` or ``EnvironmentFailed``."""
    try:
        answer = json.loads(content)
        if "error" in answer:
            raise ERRORS.get(answer["error"], EnvironmentFailed)(answer["text"])
        value = answer["result"]
        return RESULTS[method](**value) if method in RESULTS else value
    except (ValueError, TypeError, KeyError) as error:
        raise EnvironmentFailed(f"the environment's process answered what is no result ({error}).") from None
