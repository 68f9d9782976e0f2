"""JSON calls to a vLLM server: each ends with a reply, or with an error that states what was waited for.

Excluded: single HTTP calls (``align.inference.transport``), and routes and fields, which are in ``server.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from concurrent.futures import CancelledError, Future
from typing import Any
from urllib.parse import urlsplit

from align.errors import with_article
from align.inference.protocol import Progress
from align.inference.transport import Reply, Transport, background_loop, root_cause

POLL_SECONDS = 0.25
"""Time between two looks at a server's process."""
PROBE_SECONDS = 1.0
"""Time that ``/health`` has to answer."""
EXIT_SECONDS = 3.0
"""Time that a process has to end where ``/health`` does not answer."""
UNIX = "unix:"
MAX_REPLY_BYTES = 256 << 20
"""Bytes of one reply; the log-probabilities of 128k tokens need some 20 MiB."""
MAX_QUOTE = 300
"""Characters of a reply that a message quotes."""


class EngineLost(RuntimeError):
    """The server did not answer, or not in time, or has died."""


class BadReply(RuntimeError):
    """The server answered something other than what was asked for."""


class WeightsChanged(RuntimeError):
    """The server does not hold the weights that this run gave it last."""

    def __init__(self, message: str, restarted: bool = False) -> None:
        super().__init__(message)
        self.restarted = restarted
        """True when it holds what a server has right after its start."""


class Client:
    """JSON calls to one server, each of which ends within ``timeout`` seconds. Safe to use from several threads."""

    def __init__(self, address: str, timeout: float, key: str, server: Any = None) -> None:
        """``key`` goes into the header of every call and nowhere else.

        ``server`` is the ``LocalServer`` behind ``address`` if this run started it; error messages describe it.
        """
        parts = urlsplit(address)
        self.address = address.rstrip("/")
        self.host = parts.hostname or ""
        self.port = parts.port or 80
        self.timeout = timeout
        self.server = server
        self._key = key
        is_unix = self.address.startswith(UNIX)
        self._transport = Transport(
            "http://localhost" if is_unix else self.address,
            key=key,
            headers={"Accept-Encoding": "identity", "Connection": "close"},
            keeps_connections=False,
            socket_path=self.address.removeprefix(UNIX) if is_unix else None,
        )
        self._in_flight: set[Future[Reply]] = set()
        self._lock = threading.Lock()

    # ---- calls ----

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Return the JSON of one reply. Raises as ``calls``."""
        return self.calls(path, [body], method=method)[0]

    def calls(
        self,
        path: str,
        bodies: list[Any],
        concurrency: int = 1,
        on_progress: Progress | None = None,
        method: str = "POST",
    ) -> list[Any]:
        """Return the replies in the order of ``bodies``, of which at most ``concurrency`` are in flight.

        Raises ``EngineLost`` or ``BadReply`` at the first call that fails, and cancels the others of ``bodies``.
        """
        ended_calls: queue.SimpleQueue[tuple[int, Future[Reply]]] = queue.SimpleQueue()
        unfinished: set[Future[Reply]] = set()

        def start(index: int) -> None:
            future = self.submit(method, path, bodies[index])
            unfinished.add(future)
            future.add_done_callback(lambda ended: ended_calls.put((index, ended)))

        replies: list[Any] = [None] * len(bodies)
        try:
            # Keep ``concurrency`` calls in flight: each that ends starts the next.
            started = min(concurrency, len(bodies))
            for index in range(started):
                start(index)
            for count in range(1, len(bodies) + 1):
                index, future = self._next_finished(ended_calls, path)
                unfinished.discard(future)
                replies[index] = self.read(_outcome(future, path))
                if started < len(bodies):
                    start(started)
                    started += 1
                if on_progress is not None:
                    on_progress(count, len(bodies))
            return replies
        finally:
            # Only these: a session has requests under way while it asks for the weights that the server holds.
            for future in unfinished:
                future.cancel()

    def _next_finished(
        self, ended_calls: queue.SimpleQueue[tuple[int, Future[Reply]]], path: str
    ) -> tuple[int, Future[Reply]]:
        """Return the next call to end. Raises ``EngineLost`` as soon as the server's process has ended.

        A child of a dead server may keep its connections open, so the process is looked at, not only the connection.
        """
        seconds = 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                return ended_calls.get(timeout=POLL_SECONDS)
            seconds += POLL_SECONDS
            if self.has_exited():
                raise self.lost(Reply(path, seconds, error=ConnectionError("its process ended")))

    def submit(
        self, method: str, path: str, body: Any = None, timeout: float | None = None, with_key: bool = True
    ) -> Future[Reply]:
        """Start one call, and return the future of its ``Reply``, which holds errors instead of raising them."""
        exchange = self._transport.exchange(
            method,
            path,
            None if body is None else json.dumps(body).encode(),
            timeout=self.timeout if timeout is None else timeout,
            max_bytes=MAX_REPLY_BYTES,
            with_key=with_key,
        )
        future = asyncio.run_coroutine_threadsafe(exchange, background_loop())
        with self._lock:
            self._in_flight.add(future)
        # The client remembers the future until it ends, so ``cancel_all`` finds it.
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Reply]) -> None:
        with self._lock:
            self._in_flight.discard(future)

    def exchange(
        self, method: str, path: str, body: Any = None, timeout: float | None = None, with_key: bool = True
    ) -> Reply:
        """Return the outcome of one call. Errors of the call are in the ``Reply``; they are not raised."""
        return _outcome(self.submit(method, path, body, timeout, with_key), path)

    def cancel_all(self) -> None:
        """Cancel the calls in flight. vLLM drops the requests behind them."""
        with self._lock:
            in_flight = list(self._in_flight)
        for future in in_flight:
            future.cancel()

    # ---- replies ----

    def read(self, reply: Reply) -> Any:
        """Return the JSON of a reply. Raises ``EngineLost`` or ``BadReply``."""
        if reply.error is not None:
            raise self.lost(reply)
        # A 500 may be about one request, or mean that the engine behind the HTTP server has died: /health knows.
        if reply.status >= 500 and self.health() != "answers":
            raise EngineLost(
                f"the vLLM server at {self.address} failed at {reply.path} with status {reply.status}: "
                f"{self._quote(reply.data)}. {self.state()}"
            )
        if reply.status != 200:
            raise BadReply(
                f"the vLLM server at {self.address} answered {reply.path} with status {reply.status}: "
                f"{self._quote(reply.data)}"
            )
        try:
            return json.loads(reply.data)
        except (ValueError, RecursionError):  # RecursionError: brackets that nest without end
            raise self.unexpected(reply.path, "it is not JSON", reply.data) from None

    def find(self, path: str, answer: Any, *keys: str | int) -> Any:
        """Return the part of an answer below ``keys``. Raises ``BadReply`` when it is not there."""
        part = answer
        for key in keys:
            try:
                part = part[key]
            except (KeyError, IndexError, TypeError):
                raise self.unexpected(path, f"it lacks {'.'.join(map(str, keys))}", answer) from None
        return part

    def unexpected(self, path: str, problem: str, content: Any) -> BadReply:
        """Return the error for an answer that is not what vLLM 0.31 gives."""
        return BadReply(
            f"the vLLM server at {self.address} gave an answer to {path} that cannot be used: {problem}. It began with "
            f"{self._quote(content)}. Is it a vLLM server, of a version that align supports (pyproject.toml, extra "
            "vllm)?"
        )

    def lost(self, reply: Reply) -> EngineLost:
        """Return the error for a call that failed."""
        if reply.error is None or reply.is_timeout:
            problem = f"did not answer {reply.path} within {self.timeout:g} s (runtime.engine.timeout)"
        else:
            cause = root_cause(reply.error)
            problem = (
                f"could not be asked for {reply.path}: {type(cause).__name__}: {cause}, after "
                f"{reply.seconds:.1f} s of at most {self.timeout:g}"
            )
        return EngineLost(f"the vLLM server at {self.address} {problem}. {self.state()}")

    def _quote(self, content: Any) -> str:
        """Return the beginning of an answer, without the key."""
        try:
            is_bytes = isinstance(content, bytes)
            text = content[: 4 * MAX_QUOTE].decode("utf-8", "replace") if is_bytes else json.dumps(content)
        except RecursionError:
            text = f"{with_article(type(content).__name__)} that nests too deep to be shown"
        text = self._transport.hide_key(text)
        return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."

    # ---- state of the server ----

    def has_exited(self) -> bool:
        """Return True when this run started the server and its process has ended."""
        return self.server is not None and self.server.process.poll() is not None

    def health(self) -> str:
        """Describe what ``/health`` says: ``answers`` when all is well."""
        reply = self.exchange("GET", "/health", timeout=min(PROBE_SECONDS, self.timeout))
        if reply.error is not None:
            return "does not answer"
        return "answers" if reply.status == 200 else f"answers with status {reply.status}"

    def state(self) -> str:
        """Describe whether the server lives, as far as can be seen from here, with the end of its log."""
        if self.server is None:
            return f"This run did not start it, so its process cannot be seen from here; /health {self.health()}."
        health = self.health()
        # A connection breaks before the process that broke it is gone: by seconds on a busy machine.
        seconds = 2 * POLL_SECONDS if health == "answers" else EXIT_SECONDS
        return f"Its process {self.server.describe_exit(seconds)}; /health {health}.{self.server.log_tail()}"


def _outcome(future: Future[Reply], path: str) -> Reply:
    """Wait for a call and return its reply. Another thread may have cancelled it, because the server was lost."""
    try:
        return future.result()
    except CancelledError:
        return Reply(path, 0.0, error=ConnectionAbortedError("the call was cancelled"))
