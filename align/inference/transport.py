"""One HTTP call to a server, bounded in time and in bytes, by httpx; errors become a ``Reply``.

``Outage`` measures how long a server has been away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import httpx

from align.pipeline.context import duration

LOG = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0
"""Time that a machine has to accept a connection."""
CHUNK_BYTES = 1 << 16
"""Bytes of a reply that are read before its length is checked again."""
REPORT_SECONDS = 60.0
"""Seconds between two lines in the log about a server that is away."""


class ReplyTooLong(Exception):
    """A server sent more bytes than any reply needs."""


@dataclass(frozen=True)
class Reply:
    """Outcome of one call. ``status`` is 0 when no reply came, and ``error`` then says why."""

    path: str
    seconds: float
    status: int = 0
    data: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def is_unreachable(self) -> bool:
        """True when no connection was made, so the server cannot have seen the request."""
        return isinstance(self.error, httpx.ConnectError | httpx.ConnectTimeout)

    @property
    def is_timeout(self) -> bool:
        """True when the call was connected or connecting, and its time ran out."""
        return isinstance(self.error, TimeoutError | httpx.TimeoutException)


@dataclass
class Outage:
    """Time for which a server has been away. All requests to it share the time."""

    server: str
    patience: float
    place: str
    """Place of ``patience`` in the YAML."""
    began: float | None = None
    """Monotonic time of the first failure; None while the server answers."""
    answers: int = 0
    """Answers so far, usable or not: a server that answers other requests is not away."""
    _reported: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the first failure."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def seconds_left(self) -> float:
        """Seconds until the patience ends."""
        return max(0.0, self.patience - self.seconds)

    def extend(self, failure: str) -> None:
        """Note another failure, and log it unless that was done within a minute."""
        now = time.monotonic()
        is_first = self.began is None
        if is_first:
            self.began = now
        if not self.seconds_left or (not is_first and now - self._reported < REPORT_SECONDS):
            return
        self._reported = now
        so_far = "" if is_first else f"has been away for {duration(self.seconds)}: it "
        LOG.warning(
            "the endpoint %s %s%s; waiting up to %s (%s)",
            *(self.server, so_far, failure, duration(self.patience), self.place),
        )

    def end(self) -> None:
        """Note that the server answers."""
        self.answers += 1
        if self.began is not None:
            LOG.warning("the endpoint %s answers again after %s", self.server, duration(self.seconds))
        self.began = None


class Transport:
    """Calls to one server. Use it inside one event loop."""

    def __init__(
        self,
        base_url: str,
        *,
        key: str = "",
        headers: Mapping[str, str] | None = None,
        max_connections: int | None = None,
        keeps_connections: bool = True,
        socket_path: str | None = None,
        uses_proxies: bool = False,
    ) -> None:
        """``key`` goes only into the Authorization header. ``socket_path`` is a Unix socket to connect to."""
        self.base_url = base_url
        self._key = key
        idle = max_connections if keeps_connections else 0
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=idle)
        common = {"Content-Type": "application/json", **(headers or {})}
        if socket_path is not None:
            unix = httpx.AsyncHTTPTransport(uds=socket_path, limits=limits)
            self._client = httpx.AsyncClient(headers=common, transport=unix, trust_env=False)
        else:
            self._client = httpx.AsyncClient(headers=common, limits=limits, trust_env=uses_proxies)

    async def exchange(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        timeout: float,
        max_bytes: int,
        with_key: bool = True,
    ) -> Reply:
        """Return the outcome of one call that needs at most ``timeout`` seconds, from connecting to the last byte.

        Errors of the network and of HTTP are returned in the ``Reply``, not raised.
        """
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {self._key}"} if with_key and self._key else {}
        # The call as a whole is bounded: a server that sends a byte now and then would pass a bound on each read.
        limits = httpx.Timeout(None, connect=min(CONNECT_SECONDS, timeout))
        try:
            async with (
                asyncio.timeout(timeout),
                self._client.stream(
                    method, f"{self.base_url}{path}", content=content, headers=headers, timeout=limits
                ) as response,
            ):
                data = await _read_body(response, max_bytes)
            return Reply(path, time.monotonic() - began, response.status_code, data, response.headers)
        except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError, ReplyTooLong) as error:
            # ValueError: headers or bodies that cannot be decoded.
            return Reply(path, time.monotonic() - began, error=error)

    def hide_key(self, text: str) -> str:
        """Return ``text`` without the key, which some servers repeat in their errors."""
        return text.replace(self._key, "***") if self._key else text

    async def close(self) -> None:
        """Close idle connections."""
        await self._client.aclose()


async def _read_body(response: httpx.Response, max_bytes: int) -> bytes:
    """Return the whole body. Raises ``ReplyTooLong`` as soon as it has more bytes, counted after decompression."""
    data = bytearray()
    async for chunk in response.aiter_bytes(CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise ReplyTooLong(f"its answer has more than {max_bytes >> 20} MiB")
    return bytes(data)


def root_cause(error: BaseException) -> BaseException:
    """Return the operating system's error that httpx and httpcore have wrapped, or ``error`` if there is none."""
    cause = error
    system_error = None
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            system_error = cause
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return system_error or error


@cache
def background_loop() -> asyncio.AbstractEventLoop:
    """Return this process's event loop for calls from ordinary threads; it runs in a daemon thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="http-transport", daemon=True).start()
    return loop


# A forked child has the loop, but not the thread that runs it.
os.register_at_fork(after_in_child=background_loop.cache_clear)
