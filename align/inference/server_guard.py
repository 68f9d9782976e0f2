"""Guard in front of every route of a vLLM server: a key is required, browsers and foreign host names are refused.

vLLM's own ``--api-key`` (0.31) covers routes that begin with ``/v1``, ``/v2``, ``/inference`` or ``/cohere``. It leaves
``/collective_rpc``, which replaces weights, and ``/server_info``, which shows paths, open to anybody. vLLM loads the
guard with ``--middleware align.inference.server_guard.Guard``. Uses the standard library only, so the server needs
no other part of align for it. Leaves out encryption: a key travels over the network as it is.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

KEY = "ALIGN_SERVER_KEY"
KEY_FILE = "ALIGN_SERVER_KEY_FILE"
HOSTS = "ALIGN_SERVER_HOSTS"
"""Environment variables: the key itself or a file with it, and further names that clients may call the server by."""
MIN_CHARACTERS = 16
"""Shortest key that is accepted; ``new_key`` makes 64 hex digits."""
LOOPBACK = ("localhost", "ip6-localhost", "ip6-loopback")
BROWSER = (b"origin", b"sec-fetch-site", b"sec-fetch-mode")
"""Headers that browsers add and pages cannot remove; the trainer's client sends none of them."""

App = Callable[[Any, Any, Any], Awaitable[None]]


def new_key() -> str:
    """Make a random key of 256 bits, as hex digits."""
    return secrets.token_hex(32)


def write_key(key: str, path: Path) -> None:
    """Write a key to a new file that only this user may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")


def key_problem(key: str) -> str | None:
    """Say what is wrong with a key, without repeating it; None if it is right."""
    if len(key) < MIN_CHARACTERS:
        return f"it has fewer than {MIN_CHARACTERS} characters"
    if not (key.isascii() and key.isprintable()) or " " in key:
        return "it has characters other than printable ASCII, or a space"
    return None


def key_of_environment() -> str:
    """Read the server's key. Raises ``RuntimeError`` if there is none, so no server starts unguarded."""
    file = os.environ.get(KEY_FILE)
    key = (Path(file).read_text(encoding="utf-8") if file else os.environ.get(KEY, "")).strip()
    problem = key_problem(key)
    if problem is not None:
        raise RuntimeError(
            f"{KEY_FILE if file else KEY}: the server's key cannot be used: {problem}. Make one: "
            "python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return key


def known_hosts() -> frozenset[str]:
    """List the names that this machine may be called by, in lower case."""
    extra = (name.strip() for name in os.environ.get(HOSTS, "").split(","))
    names = [*LOOPBACK, socket.gethostname(), socket.getfqdn(), *extra]
    return frozenset(name.lower() for name in names if name)


def host_name(header: str) -> str:
    """Take the name or address out of a Host header: without port, without brackets, in lower case."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def is_known(name: str, names: Iterable[str]) -> bool:
    """Return True when a client may call the server by this name.

    Numeric addresses pass: a page that has its own name point here (DNS rebinding) sends that name, never a number.
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


class Guard:
    """ASGI middleware: a request or websocket without the key, from a browser, or to a foreign name goes no further.

    No part of a refused request's body is read.
    """

    def __init__(self, app: App, key: str | None = None, hosts: Iterable[str] | None = None) -> None:
        """Guard ``app``; key and names come from the environment if they are not passed."""
        self.app = app
        self._digest = hashlib.sha256((key_of_environment() if key is None else key).encode()).digest()
        self._hosts = known_hosts() if hosts is None else frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        # Start and end of the server itself; no client sends this.
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope.get("headers") or [])
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            await _refuse(send, *refusal)

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Return the status and reason to refuse a request with these headers, or None."""
        # Every header counts that was sent: a second Host or Authorization must not slip past the first.
        values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            values.setdefault(name.lower(), []).append(value)
        # A page in a browser on this machine could otherwise call a server at localhost.
        if any(name in values for name in BROWSER):
            return 403, "requests of browsers are refused"
        hosts = values.get(b"host", [])
        if len(hosts) != 1 or not is_known(host_name(hosts[0].decode("latin-1")), self._hosts):
            return 403, f"this server is not known by that name; {HOSTS} names further ones"
        credentials = values.get(b"authorization", [])
        if len(credentials) != 1 or not self._fits(credentials[0]):
            return 401, "the key is missing or wrong"
        return None

    def _fits(self, credential: bytes) -> bool:
        scheme, _, key = credential.partition(b" ")
        # Digests of equal length are compared, in constant time: the time of an answer does not depend on the key.
        fits = secrets.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        return scheme.lower() == b"bearer" and fits


async def _refuse(send: Any, status: int, reason: str) -> None:
    content = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})
