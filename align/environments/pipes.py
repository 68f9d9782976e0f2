"""Messages between this process and those of environments, in JSON: what they read runs no code. Torch-free."""

from __future__ import annotations

import importlib
import json
import socket
import struct
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from align.environments.environment import Action, EnvironmentSource
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


def encode_source(source: EnvironmentSource) -> bytes:
    """Return a source for ``decode_source``: its class and its fields."""
    assert is_dataclass(source)
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return json.dumps({"module": type(source).__module__, "class": type(source).__name__, "fields": values}).encode()


def decode_source(content: bytes) -> EnvironmentSource:
    """Return the source of ``encode_source``."""
    message = json.loads(content)
    source: EnvironmentSource = getattr(importlib.import_module(message["module"]), message["class"])(
        **message["fields"]
    )
    return source


def encode_request(method: str, inputs: tuple[Any, ...]) -> bytes:
    """Return a call of a method for ``decode_request``. Raises ``EnvironmentFailed`` for a row that is no JSON."""
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
