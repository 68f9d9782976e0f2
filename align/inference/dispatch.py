"""Requests to several servers: each to the one with the fewest tokens in flight, and again to another where it fails.

A server that is lost (it died, hangs, or talks nonsense several times in a row) is told to the pool, and what it had
under way goes to the others. Left out: what is asked (``server.py``), and how a lost server comes back (``pool.py``).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from align.inference.protocol import Progress
from align.inference.server_client import POLL_SECONDS, PROBE_SECONDS, BadReply, Client, EngineLost, Reply

HEALTH_SECONDS = 15.0
"""Without an answer, after which a server is asked whether it is well; and the time that it then has to say so."""
HEALTH_MISSES = 3
"""Such questions in a row without a good answer: it is lost."""
BAD_REPLIES = 3
"""Answers in a row that cannot be used, of one server: it is lost. To one request, of any: no server can answer it."""


class Pool(Protocol):
    """Whose servers they are."""

    @property
    def members(self) -> Sequence[Any]:
        """Servers: ``client`` asks one, ``ready`` says whether it holds the weights that are sampled from."""
        ...

    def lose(self, member: Any, error: Exception) -> None:
        """Hear that a server is lost."""
        ...

    def await_ready(self) -> None:
        """Wait until a server is ready. Raises ``EngineLost`` when none will be."""
        ...


@dataclass(frozen=True)
class Question:
    """One request: its body, what its answer must be read by, and the tokens that it may take in all."""

    body: dict[str, Any]
    read: Callable[[Any, dict[str, Any], Any], Any]
    """From a member, the body and the answer; raises ``BadReply``."""
    group: int
    """Questions of one group go to one server, where they share their prompt's keys and values."""

    @property
    def tokens(self) -> int:
        """Of prompt and answer at most."""
        return len(self.body["prompt"]) + int(self.body["max_tokens"])


@dataclass
class _Desk:
    """What one server has under way."""

    member: Any
    places: set[int] = field(default_factory=set)
    tokens: int = 0
    turn: int = 0
    """Raised when it is lost, so that what it still answers is not taken for an answer to what it was asked later."""
    bad: int = 0
    """Answers in a row that could not be used."""
    heard: float = 0.0
    """When it last answered, or was first asked."""
    asked: float = 0.0
    """When it was last asked how it is."""
    misses: int = 0


class Dispatch:
    """One round of questions; ``run`` gives their answers in order."""

    def __init__(
        self, pool: Pool, path: str, questions: Sequence[Question], at_once: int, on_progress: Progress | None = None
    ) -> None:
        """``at_once`` is how many questions a server has under way at most."""
        self.pool, self.path, self.questions, self.at_once = pool, path, questions, at_once
        self.on_progress = on_progress
        self.answers: list[Any] = [None] * len(questions)
        self.left = len(questions)
        self.bad: dict[int, int] = {}
        """Bad replies so far, by the place of their question."""
        self.avoid: dict[int, set[int]] = {}
        """Servers that gave them."""
        self.desks = [_Desk(member) for member in pool.members]
        self.pending = deque(self._groups(range(len(questions))))
        self.heard: queue.SimpleQueue[tuple[_Desk, int, int, Reply]] = queue.SimpleQueue()
        self.given_up = threading.Event()

    def run(self) -> list[Any]:
        """Ask until everything is answered. Raises ``EngineLost`` when no server is left, ``BadReply`` for a question
        that was answered with nonsense several times."""
        # More than can be under way: a call to a lost server may not have ended when its question is asked again.
        most = 4 * self.at_once * len(self.desks) + len(self.desks)
        self.threads = ThreadPoolExecutor(most, thread_name_prefix="vllm-server")
        try:
            while self.left:
                self._assign()
                with contextlib.suppress(queue.Empty):
                    self._hear(*self.heard.get(timeout=POLL_SECONDS))
                self._look()
                if self.left and not any(desk.places for desk in self.desks):
                    self.pool.await_ready()
            return self.answers
        finally:
            self.given_up.set()
            self.threads.shutdown(wait=False, cancel_futures=True)
            for desk in self.desks:
                desk.member.client.sever()

    def _groups(self, places: Sequence[int] | set[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for place in sorted(places):
            found.setdefault(self.questions[place].group, []).append(place)
        return list(found.values())

    # ---- asking ----

    def _assign(self) -> None:
        """Hand groups out, in their order, as long as a server has room."""
        for _ in range(len(self.pending)):
            group = self.pending.popleft()
            desk = self._least_loaded(group)
            if desk is None:
                self.pending.appendleft(group)
                return
            for place in group:
                self._ask(desk, place)

    def _least_loaded(self, group: list[int]) -> _Desk | None:
        """The ready server with room that has the fewest tokens in flight; one that failed here only if all did."""
        ready = [number for number, desk in enumerate(self.desks) if desk.member.ready]
        failed = set().union(*(self.avoid.get(place, set()) for place in group))
        room = [number for number in ready if len(self.desks[number].places) < self.at_once]
        wanted = [number for number in room if number not in failed]
        if not wanted and set(ready) <= failed:
            wanted = room
        return min((self.desks[number] for number in wanted), key=lambda desk: desk.tokens, default=None)

    def _ask(self, desk: _Desk, place: int) -> None:
        if not desk.places:
            desk.heard = time.monotonic()
        desk.places.add(place)
        desk.tokens += self.questions[place].tokens
        self.threads.submit(self._exchange, desk, desk.turn, place, desk.member.client)

    def _exchange(self, desk: _Desk, turn: int, place: int, client: Client) -> None:
        body = self.questions[place].body
        self.heard.put((desk, turn, place, client.exchange("POST", self.path, body, client.timeout, self.given_up)))

    # ---- hearing ----

    def _hear(self, desk: _Desk, turn: int, place: int, reply: Reply) -> None:
        if turn != desk.turn:
            return  # of a server that was lost meanwhile; somebody else was asked
        if place < 0:
            self._hear_health(desk, reply)
            return
        desk.heard = time.monotonic()
        question = self.questions[place]
        try:
            self.answers[place] = question.read(desk.member, question.body, desk.member.client.read(reply))
        except EngineLost as error:
            self._lose(desk, error)
            return
        except BadReply as error:
            self._hear_nonsense(desk, place, error)
            return
        self._settle(desk, place)
        desk.bad, desk.misses = 0, 0
        self.left -= 1
        if self.on_progress is not None:
            self.on_progress(len(self.questions) - self.left, len(self.questions))

    def _settle(self, desk: _Desk, place: int) -> None:
        desk.places.discard(place)
        desk.tokens -= self.questions[place].tokens

    def _hear_nonsense(self, desk: _Desk, place: int, error: BadReply) -> None:
        """Ask another; give up on a question that nobody answers, and on a server that answers none."""
        self._settle(desk, place)
        self.bad[place] = self.bad.get(place, 0) + 1
        self.avoid.setdefault(place, set()).add(self.desks.index(desk))
        if self.bad[place] >= BAD_REPLIES:
            raise error
        self.pending.appendleft([place])
        desk.bad += 1
        if desk.bad >= BAD_REPLIES:
            self._lose(desk, error)

    # ---- servers that say nothing ----

    def _look(self) -> None:
        """Whether the servers that have questions still live: their process, their answers, their own word."""
        now = time.monotonic()
        for desk in self.desks:
            if not desk.places:
                continue
            client, silent = desk.member.client, now - desk.heard
            if client.server is not None and client.server.process.poll() is not None:
                self._lose(desk, client.lost(Reply(self.path, silent, error=ConnectionError("its process ended"))))
            elif silent > client.timeout + PROBE_SECONDS:
                self._lose(desk, client.lost(Reply(self.path, silent, error=TimeoutError())))
            elif silent > HEALTH_SECONDS and now - desk.asked > HEALTH_SECONDS:
                desk.asked = now
                self.threads.submit(self._ask_health, desk, desk.turn, client)

    def _ask_health(self, desk: _Desk, turn: int, client: Client) -> None:
        self.heard.put((desk, turn, -1, client.exchange("GET", "/health", None, min(HEALTH_SECONDS, client.timeout))))

    def _hear_health(self, desk: _Desk, reply: Reply) -> None:
        well = reply.error is None and reply.status == 200
        desk.misses = 0 if well else desk.misses + 1
        if desk.misses >= HEALTH_MISSES:
            said = f"status {reply.status}" if reply.error is None else type(reply.error).__name__
            what = f"did not say that it is well {desk.misses} times in a row ({said})"
            self._lose(desk, EngineLost(f"the vLLM server at {desk.member.client.address} {what}. {_state(desk)}"))

    def _lose(self, desk: _Desk, error: Exception) -> None:
        """Give what it had to the others, first in their queue."""
        self.pending.extendleft(reversed(self._groups(desk.places)))
        desk.places, desk.tokens = set(), 0
        desk.turn += 1
        desk.bad = desk.misses = 0
        desk.member.client.sever()
        self.pool.lose(desk.member, error)


def _state(desk: _Desk) -> str:
    state: str = desk.member.client.state()
    return state
