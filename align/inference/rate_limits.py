"""Limits of requests and tokens per minute, shared by all threads of a process. Torch-free.

In any 60 seconds a model gets at most ``requests_per_minute`` requests with ``tokens_per_minute`` tokens. A request
counts with an estimate when it is sent (as OpenAI's limits do: a quarter of its characters, and ``max_tokens``), and
with the server's own count when its answer arrives. Requests are sent in the order in which they asked.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from align.config.endpoint import EndpointConfig
from align.inference.requests import Answer, Request

WINDOW = 60.0
"""Seconds over which requests and tokens are counted."""
POLL_SECONDS = 0.25
"""Longest wait before the counts are read again: an answer may have been shorter than its estimate."""
CHARACTERS_PER_TOKEN = 4


@dataclass
class SentRequest:
    """A request of the last minute."""

    time: float
    tokens: int


@dataclass
class RequestLog:
    """Requests that one model got in the last minute, and those that wait for their turn. Any thread may use it."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _sent: deque[SentRequest] = field(default_factory=deque)
    _waiting: deque[object] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def acquire(self, tokens: int, requests_limit: float, tokens_limit: float) -> SentRequest:
        """Wait until a request of ``tokens`` keeps to both limits, and log it as sent.

        A request that is larger than ``tokens_limit`` waits until nothing else was sent for a minute.
        """
        turn = object()
        with self._lock:
            self._waiting.append(turn)
        try:
            while True:
                with self._lock:
                    seconds = POLL_SECONDS
                    # Requests go in the order in which they came. Otherwise small ones could overtake a large one for
                    # ever.
                    if self._waiting[0] is turn:
                        seconds = self._seconds_left(tokens, requests_limit, tokens_limit)
                    if seconds == 0.0:
                        request = SentRequest(self.clock(), tokens)
                        self._sent.append(request)
                        return request
                await self.sleep(min(seconds, POLL_SECONDS))
        finally:
            with self._lock:
                self._waiting.remove(turn)

    def _seconds_left(self, tokens: int, requests_limit: float, tokens_limit: float) -> float:
        """Return the seconds until a request fits, if no answer corrects an estimate; 0 if it fits now."""
        now = self.clock()
        while self._sent and self._sent[0].time + WINDOW <= now:
            self._sent.popleft()
        requests = len(self._sent)
        total = sum(request.tokens for request in self._sent)
        for request in [None, *self._sent]:
            # Each further request leaves the window at its own time.
            if request is not None:
                requests -= 1
                total -= request.tokens
            if requests == 0 or (requests < requests_limit and total + tokens <= tokens_limit):
                return 0.0 if request is None else request.time + WINDOW - now
        raise AssertionError("an empty window has room")


_logs: dict[tuple[str, str, str | None], RequestLog] = {}
_logs_lock = threading.Lock()


class RateLimit:
    """The limits of an endpoint. Endpoints with the same address, model and key share their counts."""

    def __init__(self, config: EndpointConfig, log: RequestLog | None = None) -> None:
        self.requests = config.requests_per_minute
        self.tokens = config.tokens_per_minute
        self.log = log or _shared_log(config)

    async def acquire(self, request: Request) -> SentRequest | None:
        """Wait until the request may be sent; return its place in the counts, None without limits."""
        if self.requests is None and self.tokens is None:
            return None
        return await self.log.acquire(estimate_tokens(request), self.requests or math.inf, self.tokens or math.inf)

    def correct(self, sent: SentRequest | None, answer: Answer) -> Answer:
        """Count the tokens of an answered request as the server does, if it says so. Returns the answer."""
        if sent is not None and answer.prompt_tokens is not None and answer.completion_tokens is not None:
            sent.tokens = answer.prompt_tokens + answer.completion_tokens
        return answer


def estimate_tokens(request: Request) -> int:
    """Return the tokens that a request counts until its answer arrives."""
    texts = [str(message.get(name) or "") for message in request.messages for name in ("content", "tool_calls")]
    characters = sum(map(len, texts)) + len(request.tools)
    return characters // CHARACTERS_PER_TOKEN + request.max_tokens


def _shared_log(config: EndpointConfig) -> RequestLog:
    with _logs_lock:
        return _logs.setdefault((config.url, config.model, config.key_variable), RequestLog())
