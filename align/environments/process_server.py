"""The process from which those of episodes are forked.

It imports the user's module once and runs no thread, so that a fork takes milliseconds and is safe. ``processes.py``
starts it with a socket, over which it sends the source of environments as JSON, then commands of nine bytes. ``F`` and
a number forks a process for an episode, which serves the descriptor that comes along. ``K`` and a number kills it, and
``R`` lets it end by itself first; both are answered with how it ended. All die when the socket closes. Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time

from align.environments.environment import Environment, EnvironmentSource
from align.environments.errors import EnvironmentFailed, ToolError
from align.environments.methods import describe_failure
from align.environments.pipes import (
    Disconnected,
    decode_request,
    decode_source,
    encode_error,
    encode_result,
    receive,
    send,
)
from align.environments.process_tree import adopt_orphans, children_of, kill_children_except, kill_descendants
from align.pipeline.stop_signal import die_with_parent

COMMAND = struct.Struct("!cQ")
FORK, KILL, REAP = b"F", b"K", b"R"
LAST_SECONDS = 2.0
"""Time that a process whose connection is closed has to end by itself, so that it is known how."""
STATUS = struct.Struct("!i")


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
    adopt_orphans()  # of an episode whose process has died
    helpers = set(children_of(os.getpid()))  # the user's module may have started some
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
                # A process that has died left what it had started to this one.
                kill_children_except(helpers.union(children.values()))
                control.sendall(STATUS.pack(status))
    finally:
        for child in children.values():
            _kill(child)
        kill_children_except(helpers)


def _fork(source: EnvironmentSource, control: socket.socket, descriptor: int) -> int:
    """Fork a process that serves the descriptor; returns its id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    try:
        os.setsid()  # a group of its own, with most of what its tools start
        adopt_orphans()  # of daemons, which leave the group
        die_with_parent(parent)
        # A copy of this socket would hide from the stage that the server has died.
        control.close()
        serve(source, socket.socket(fileno=descriptor))
    finally:
        os._exit(0)


def _await_end(child: int) -> None:
    """Wait a moment for a child to end, without taking its status."""
    deadline = time.monotonic() + LAST_SECONDS
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def _kill(child: int) -> int:
    """Kill a child that was not waited for yet, with all it has started; returns how it had ended, or ``-SIGKILL``."""
    # The child is no other process as long as nobody waited for it.
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        kill_descendants(child)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status)


def serve(source: EnvironmentSource, connection: socket.socket) -> None:
    """Make an instance, and call its methods as the other end asks, until it closes the connection."""
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
        # The process ends by os._exit(), which would lose what is still buffered.
        sys.stdout.flush()
        send(connection, answer)
