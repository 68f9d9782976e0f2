"""Messages between this process and those of environments: requests are pickled, answers are JSON.

An environment may run what a model wrote, so nothing that comes back is unpickled. Torch-free.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict
from typing import Any

from align.environments.errors import ERRORS, EnvironmentFailed, ToolError
from align.environments.results import Scores, Step

LARGEST = 64 * 2**20
"""Bytes of the largest message."""
_LENGTH = struct.Struct("!Q")
FAILED = "failed"
RESULTS = {"step": Step, "score": Scores}
"""Methods that return more than JSON holds, and what they return."""


class Disconnected(Exception):
    """The other end is gone."""


def send(connection: socket.socket, content: bytes) -> None:
    """Send a message. Raises ``Disconnected``."""
    try:
        connection.sendall(_LENGTH.pack(len(content)) + content)
    except OSError as error:
        raise Disconnected(str(error)) from None


def receive(connection: socket.socket) -> bytes:
    """Wait for a message. Raises ``Disconnected``, and ``EnvironmentFailed`` for one that is too large."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > LARGEST:
        raise EnvironmentFailed(f"the environment returned {length:,} bytes; return at most {LARGEST:,}.")
    return _read(connection, length)


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
