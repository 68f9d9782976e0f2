"""JSON calls to a vLLM server: each ends in bounded time, with an answer or with what was waited for.

Knows how to ask and what went wrong, not what is asked: routes and fields stand in ``server.py``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from align.inference.protocol import Progress

if TYPE_CHECKING:
    from align.inference.server_process import LocalServer

POLL_SECONDS, PROBE_SECONDS = 0.25, 1.0
UNIX = "unix:"
MOST_BYTES = 256 << 20
"""Of one answer; one with the log-probabilities of 128k tokens has some 20 MiB."""
CONNECT_SECONDS = 20.0
"""For a machine to say that it is there; calls that wait for it cannot be ended otherwise."""


class EngineLost(RuntimeError):
    """The server did not answer, or not in time, or has died."""


class BadReply(RuntimeError):
    """The server answered something other than what was asked for."""


class WeightsChanged(RuntimeError):
    """The server does not hold the weights that this run gave it last."""

    def __init__(self, message: str, restarted: bool = False) -> None:
        super().__init__(message)
        self.restarted = restarted
        """Whether it holds what a server has that was just started."""


@dataclass(frozen=True)
class Reply:
    """What came of one call; ``status`` is 0 when nothing came, and then ``error`` says why."""

    path: str
    seconds: float
    status: int = 0
    data: bytes = b""
    error: Exception | None = None


class Client:
    """JSON calls to one server, each of which ends within ``timeout`` seconds."""

    def __init__(self, address: str, timeout: float, key: str, server: LocalServer | None = None) -> None:
        """``key`` goes into the header of every call and nowhere else. ``server`` is the process behind ``address``
        where it is ours, for error messages."""
        parts = urlsplit(address)
        self.address, self.host, self.port = address.rstrip("/"), parts.hostname or "", parts.port or 80
        self.timeout, self.server, self._key = timeout, server, key
        self._open: set[socket.socket | None] = set()
        self._lock = threading.Lock()

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """The answer to one call."""
        return self.calls(path, [body], method=method)[0]

    def calls(
        self, path: str, bodies: list[Any], at_once: int = 1, on_progress: Progress | None = None, method: str = "POST"
    ) -> list[Any]:
        """Answers in the order of ``bodies``, of which ``at_once`` are under way at most.

        Raises ``EngineLost`` or ``BadReply`` at the first call that fails, and gives the others up.
        """
        finished: queue.SimpleQueue[Future[Reply]] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(max(1, min(at_once, len(bodies))), thread_name_prefix="vllm-server")
        given_up = threading.Event()
        try:
            futures = [pool.submit(self.exchange, method, path, body, self.timeout, given_up) for body in bodies]
            places = {future: place for place, future in enumerate(futures)}
            for future in futures:
                future.add_done_callback(finished.put)
            answers: list[Any] = [None] * len(bodies)
            for done in range(1, len(bodies) + 1):
                future = self._next(finished, path)
                answers[places[future]] = self.read(future.result())
                if on_progress is not None:
                    on_progress(done, len(bodies))
            return answers
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            given_up.set()
            self.sever()

    def _next(self, finished: queue.SimpleQueue[Future[Reply]], path: str) -> Future[Reply]:
        """The next call to end. A server that sends a byte now and then keeps a socket from timing out, not this."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return finished.get(timeout=POLL_SECONDS)
            seconds = time.monotonic() - began
            if self.server is not None and self.server.process.poll() is not None:
                raise self.lost(Reply(path, seconds, error=ConnectionError("its process ended")))
            if seconds > self.timeout + PROBE_SECONDS:
                raise self.lost(Reply(path, seconds, error=TimeoutError()))

    def exchange(
        self,
        method: str,
        path: str,
        body: Any,
        timeout: float,
        given_up: threading.Event | None = None,
        with_key: bool = True,
    ) -> Reply:
        """One call, in a thread of its own. Nothing is raised: the caller asks for the state of the server first."""
        began = time.monotonic()
        connection = self._connection(min(CONNECT_SECONDS, timeout))
        opened = None
        try:
            connection.connect()
            opened = connection.sock  # the connection itself forgets it before the answer is read
            opened.settimeout(timeout)
            with self._lock:
                self._open.add(opened)
            if given_up is not None and given_up.is_set():
                raise ConnectionAbortedError("given up before it was sent")
            content = None if body is None else json.dumps(body).encode()
            # A server that refuses a call may answer, and close, before the body has come: the answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, content, self._headers(with_key))
            response = connection.getresponse()
            data = response.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise http.client.HTTPException(f"its answer has more than {MOST_BYTES >> 20} MiB")
            if response.length:  # a read of so many bytes at most does not say that some are missing
                raise http.client.IncompleteRead(data, response.length)
            return Reply(path, time.monotonic() - began, response.status, data)
        except (OSError, http.client.HTTPException) as error:
            return Reply(path, time.monotonic() - began, error=error)
        finally:
            with self._lock:
                self._open.discard(opened)
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self.address.startswith(UNIX):
            return _UnixConnection(self.address.removeprefix(UNIX), timeout)
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def _headers(self, with_key: bool) -> dict[str, str]:
        plain = {"Content-Type": "application/json", "Connection": "close"}
        return plain | ({"Authorization": f"Bearer {self._key}"} if with_key else {})

    def sever(self) -> None:
        """End calls still under way, so that no thread is left waiting; vLLM drops the requests behind them."""
        with self._lock:
            for one in self._open:
                if one is not None:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)

    def read(self, reply: Reply) -> Any:
        """The answer in a reply. Raises ``EngineLost`` or ``BadReply``."""
        if reply.error is not None:
            raise self.lost(reply)
        if reply.status >= 500 and self.health() != "answers":
            raise EngineLost(
                f"the vLLM server at {self.address} failed at {reply.path} with status {reply.status}: "
                f"{self._short(reply.data)}. {self.state()}"
            )
        if reply.status != 200:
            raise BadReply(
                f"the vLLM server at {self.address} answered {reply.path} with status {reply.status}: "
                f"{self._short(reply.data)}"
            )
        try:
            return json.loads(reply.data)
        except (ValueError, RecursionError):  # the latter for brackets that nest without end
            raise self.unexpected(reply.path, "it is not JSON", reply.data) from None

    def unexpected(self, path: str, what: str, got: Any) -> BadReply:
        """The error for an answer that is not what vLLM 0.31 gives."""
        return BadReply(
            f"the vLLM server at {self.address} gave an answer to {path} that cannot be used: {what}. It began with "
            f"{self._short(got)}. Is it a vLLM server, of a version that align supports (pyproject.toml, extra vllm)?"
        )

    def find(self, path: str, answer: Any, *keys: str | int) -> Any:
        """A part of an answer. Raises ``BadReply`` when it is not there."""
        found = answer
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                raise self.unexpected(path, f"it lacks {'.'.join(map(str, keys))}", answer) from None
        return found

    def lost(self, reply: Reply) -> EngineLost:
        """The error for a call that came to nothing."""
        if isinstance(reply.error, TimeoutError):
            what = f"did not answer {reply.path} within {self.timeout:g} s (runtime.engine.timeout)"
        else:
            what = (
                f"could not be asked for {reply.path}: {type(reply.error).__name__}: {reply.error}, after "
                f"{reply.seconds:.1f} s of at most {self.timeout:g}"
            )
        return EngineLost(f"the vLLM server at {self.address} {what}. {self.state()}")

    def ask(self, path: str, seconds: float, with_key: bool = True) -> Reply:
        """What a GET comes to within about ``seconds``, also where a server sends a byte now and then."""
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()

        def exchange() -> None:
            replies.put(self.exchange("GET", path, None, seconds, with_key=with_key))

        threading.Thread(target=exchange, name="vllm-server-get", daemon=True).start()
        try:
            return replies.get(timeout=seconds + PROBE_SECONDS)
        except queue.Empty:
            return Reply(path, seconds + PROBE_SECONDS, error=TimeoutError())

    def health(self) -> str:
        """What ``/health`` says, in words: ``answers`` when all is well."""
        reply = self.ask("/health", min(PROBE_SECONDS, self.timeout))
        if reply.error is not None:
            return "does not answer"
        return "answers" if reply.status == 200 else f"answers with status {reply.status}"

    def state(self) -> str:
        """Whether the server lives, as far as can be seen from here, and the end of its log."""
        if self.server is None:
            return f"This run did not start it, so its process cannot be seen from here; /health {self.health()}."
        return f"Its process {self.server.life()}; /health {self.health()}.{self.server.last_words()}"

    def _short(self, got: Any, limit: int = 300) -> str:
        """The beginning of an answer, without the key, which a server may repeat."""
        try:
            text = got[: 4 * limit].decode("utf-8", "replace") if isinstance(got, bytes) else json.dumps(got)
        except RecursionError:
            text = f"a {type(got).__name__} that nests too deep to be shown"
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= limit else f"{text[:limit]}..."


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket, which only users may open that may enter its folder."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)
