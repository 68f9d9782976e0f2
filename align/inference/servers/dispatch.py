"""Load balancing over several servers: each request goes to the least loaded one, and to another where that fails.

A server is lost when its process ends, when it does not answer in time, when it no longer says that it is well, or when
it gives several bad replies in a row. The pool is told, and the server's requests go to the others. Requests are known
at once (``run``), or are submitted while others are under way (``submit`` and ``poll``). Leaves out the content of
requests (``server.py``) and the return of lost servers (``pool.py``).
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from align.inference.protocol import Progress
from align.inference.servers.server_client import POLL_SECONDS, BadReply, EngineLost
from align.inference.transport import Reply

HEALTH_SECONDS = 15.0
"""Silence after which a server's ``/health`` is asked, and time that it then has to answer."""
HEALTH_MISSES = 3
"""Unanswered questions of health in a row after which a server is lost."""
BAD_REPLIES = 3
"""Bad replies in a row after which a server is lost; bad replies to one request after which it is given up."""


@dataclass(frozen=True)
class ServerRequest:
    """One request to any of the servers."""

    body: dict[str, Any]
    parse: Callable[[Any, dict[str, Any], Any], Any]
    """Takes the pool member, the body and the JSON of the reply; raises ``BadReply``."""
    group: int
    """Requests of one group go to one server, where they share the keys and values of their prompt."""
    affinity: tuple[Hashable, ...] = ()
    """Names under which a server is remembered: the request goes to the server that had the first of them last.

    The later names are for a request whose first name no server has had, or whose server is lost or full.
    """

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response at most: the request's load."""
        return len(self.body["prompt"]) + int(self.body["max_tokens"])


@dataclass
class ServerState:
    """One server during a round of requests."""

    index: int
    member: Any
    in_flight: set[int] = field(default_factory=set)
    """Indexes of the requests that it has."""
    tokens: int = 0
    """Load: the sum of those requests' tokens."""
    epoch: int = 0
    """Raised when the server is lost, so replies to requests from before the loss are recognized and ignored."""
    bad_replies: int = 0
    """Bad replies in a row."""
    last_reply: float = 0.0
    """Monotonic time of its last reply, or of its first request."""
    last_probe: float = 0.0
    """Monotonic time of the last question of health."""
    missed_probes: int = 0


@dataclass(frozen=True)
class ServerReply:
    """A reply in the queue. ``index`` is None for a reply to a health check."""

    state: ServerState
    epoch: int
    index: int | None
    reply: Reply


class Dispatcher:
    """Requests under way; ``run`` returns the parsed replies to all of them in order, ``poll`` as they come."""

    def __init__(
        self,
        pool: Any,
        path: str,
        requests: Sequence[ServerRequest],
        concurrency: int,
        on_progress: Progress | None = None,
    ) -> None:
        """``concurrency`` is how many requests a server of the ``PoolEngine`` has in flight at most."""
        self.pool = pool
        self.path = path
        self.concurrency = concurrency
        self.on_progress = on_progress
        self.requests = dict(enumerate(requests))
        """By index; ``poll`` drops those whose reply it has returned."""
        self.results: dict[int, Any] = {}
        """Parsed replies by index of their request."""
        self.count = self.remaining = len(requests)
        """Requests so far, and those that have no reply."""
        self.bad_replies: dict[int, int] = {}
        """Index of a request → bad replies to it so far."""
        self.failed_servers: dict[int, set[int]] = {}
        """Index of a request → servers that gave them."""
        self.servers = [ServerState(index, member) for index, member in enumerate(pool.members)]
        self.homes: dict[Hashable, int] = {}
        """Name of an affinity → index of the server that had a request with it last."""
        self.pending = deque(self._group(self.requests))
        self.replies: queue.SimpleQueue[ServerReply | None] = queue.SimpleQueue()
        """Replies to read; None only ends the waiting for one."""

    def run(self) -> list[Any]:
        """Send requests until each has a reply.

        Raises ``EngineLost`` when no server is left, ``BadReply`` for a request that got several bad replies.
        """
        try:
            while self.remaining:
                self._advance(POLL_SECONDS)
                self._await_server()
            return [self.results[index] for index in range(self.count)]
        finally:
            self.cancel()

    def submit(self, request: ServerRequest) -> int:
        """Send one more request, or queue it if no server has room. Returns its index."""
        index = self.count
        self.count = self.count + 1
        self.requests[index] = request
        self.remaining += 1
        self.pending.append([index])
        self._assign()
        return index

    def poll(self, timeout: float | None) -> dict[int, Any]:
        """Return parsed replies that have come since the last call, by index of their request; waits for the first.

        Returns none after ``timeout`` seconds, or where every request has its reply. Raises as ``run``. While no server
        is ready it waits for a server, whatever the timeout.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.remaining and not self.results:
            seconds_left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            self._advance(min(POLL_SECONDS, max(0.0, seconds_left)))
            if self.results or seconds_left <= 0:
                break
            self._await_server()
        # Also read the replies that have arrived meanwhile, without waiting.
        while self.remaining and not self.replies.empty():
            self._advance(0)
        replies = self.results
        self.results = {}
        for index in replies:
            del self.requests[index]
        return replies

    def wake(self) -> None:
        """Send what can be sent at once, since a server accepts requests again. Any thread may call it."""
        self.replies.put(None)

    def cancel(self) -> None:
        """Cancel the requests in flight. A server without any may be coming back, and read its weights."""
        for state in self.servers:
            if state.in_flight:
                state.member.client.cancel_all()

    def lose(self, member: Any, error: Exception) -> None:
        """Stop using a server that was found unfit outside of its replies; its requests go to others."""
        for state in self.servers:
            if state.member is member:
                self._lose(state, error)

    def _advance(self, seconds: float) -> None:
        """Send what can be sent, and read one reply, waiting for it at most that long."""
        # 1. Fill every ready server up to its concurrency.
        self._assign()
        # 2. Read one reply. Waiting is short, so step 3 comes around while no server answers.
        with contextlib.suppress(queue.Empty):
            arrived = self.replies.get(timeout=seconds)
            if arrived is not None:
                self._on_reply(arrived)
        # 3. Find servers that died or fell silent; their requests are pending again.
        self._check_silent_servers()

    def _await_server(self) -> None:
        """Without a request in flight no reply will come: wait until a server has come back."""
        if self.remaining and not any(state.in_flight for state in self.servers):
            self.pool.await_ready()

    def _group(self, indexes: Iterable[int]) -> list[list[int]]:
        """Return the requests by group, in their order."""
        groups: dict[int, list[int]] = {}
        for index in sorted(indexes):
            groups.setdefault(self.requests[index].group, []).append(index)
        return list(groups.values())

    # ---- sending ----

    def _assign(self) -> None:
        """Send pending groups in order, as long as a server has room."""
        while self.pending:
            # The order is kept: no group overtakes a group that waits for room.
            group = self.pending[0]
            state = self._least_loaded(group)
            if state is None:
                return
            self.pending.popleft()
            for index in group:
                self._send(state, index)

    def _least_loaded(self, group: list[int]) -> ServerState | None:
        """Return the ready server with room that has the fewest tokens in flight; None while there is none.

        A server to which the group has an affinity comes first, whatever its load. A server that gave a bad reply to a
        request of the group is only accepted when every ready server did.
        """
        ready = [state for state in self.servers if self.pool.takes_requests(state.member)]
        failed = set().union(*(self.failed_servers.get(index, set()) for index in group))
        with_room = [state for state in ready if len(state.in_flight) < self.concurrency]
        candidates = [state for state in with_room if state.index not in failed]
        # Better the server that failed than none: it may answer this time.
        if not candidates and all(state.index in failed for state in ready):
            candidates = with_room
        # A server that had an episode's last turn has the keys and values of all before the next.
        homes = [self.homes[name] for name in self.requests[group[0]].affinity if name in self.homes]
        by_index = {state.index: state for state in candidates}
        for home in homes:
            if home in by_index:
                return by_index[home]
        return min(candidates, key=lambda state: state.tokens, default=None)

    def _send(self, state: ServerState, index: int) -> None:
        # An idle server is not silent. Its clock starts with its first request.
        if not state.in_flight:
            state.last_reply = time.monotonic()
        state.in_flight.add(index)
        request = self.requests[index]
        state.tokens += request.tokens
        self.homes.update(dict.fromkeys(request.affinity, state.index))
        future = state.member.client.submit("POST", self.path, request.body)
        self._queue_reply(future, state, index)

    def _queue_reply(self, future: Future[Reply], state: ServerState, index: int | None) -> None:
        """Put the reply into the queue when it comes. Cancelled calls belong to a server that was lost."""
        epoch = state.epoch

        def on_done(call: Future[Reply]) -> None:
            if call.cancelled():
                return
            error = call.exception()
            reply = call.result() if error is None else Reply(self.path, 0.0, error=error)
            self.replies.put(ServerReply(state, epoch, index, reply))

        future.add_done_callback(on_done)

    # ---- replies ----

    def _on_reply(self, arrived: ServerReply) -> None:
        state = arrived.state
        index = arrived.index
        if arrived.epoch != state.epoch:
            return  # the server was lost since, and its requests went to others
        if index is None:
            self._on_health(state, arrived.reply)
            return
        state.last_reply = time.monotonic()
        request = self.requests[index]
        try:
            content = state.member.client.read(arrived.reply)
            self.results[index] = request.parse(state.member, request.body, content)
        except EngineLost as error:
            self._lose(state, error)
            return
        except BadReply as error:
            self._on_bad_reply(state, index, error)
            return
        self._take_off(state, index)
        state.bad_replies = 0
        state.missed_probes = 0
        self.remaining -= 1
        if self.on_progress is not None:
            self.on_progress(self.count - self.remaining, self.count)

    def _take_off(self, state: ServerState, index: int) -> None:
        """Take a request off a server's load."""
        state.in_flight.discard(index)
        state.tokens -= self.requests[index].tokens

    def _on_bad_reply(self, state: ServerState, index: int, error: BadReply) -> None:
        """Send the request to another server.

        A request with several bad replies is at fault itself, so the error is raised; a server with several bad
        replies in a row is lost.
        """
        self._take_off(state, index)
        self.bad_replies[index] = self.bad_replies.get(index, 0) + 1
        self.failed_servers.setdefault(index, set()).add(state.index)
        if self.bad_replies[index] >= BAD_REPLIES:
            raise error
        # The request goes first, since it has waited longest.
        self.pending.appendleft([index])
        state.bad_replies += 1
        if state.bad_replies >= BAD_REPLIES:
            self._lose(state, error)

    # ---- silent servers ----

    def _check_silent_servers(self) -> None:
        """Find servers whose process has ended, and ask those that are silent how they are.

        Their calls end by themselves after the timeout; this finds a dead server sooner.
        """
        now = time.monotonic()
        for state in self.servers:
            if not state.in_flight:
                continue
            client = state.member.client
            silence = now - state.last_reply
            if client.has_exited():
                ended = Reply(self.path, silence, error=ConnectionError("its process ended"))
                self._lose(state, client.lost(ended))
            elif silence > HEALTH_SECONDS and now - state.last_probe > HEALTH_SECONDS:
                state.last_probe = now
                probe = client.submit("GET", "/health", timeout=min(HEALTH_SECONDS, client.timeout))
                self._queue_reply(probe, state, None)

    def _on_health(self, state: ServerState, reply: Reply) -> None:
        if reply.error is None and reply.status == 200:
            state.missed_probes = 0
            return
        state.missed_probes += 1
        if state.missed_probes < HEALTH_MISSES:
            return
        reason = f"status {reply.status}" if reply.error is None else type(reply.error).__name__
        client = state.member.client
        self._lose(
            state,
            EngineLost(
                f"the vLLM server at {client.address} did not say that it is well {state.missed_probes} times in a row "
                f"({reason}). {client.state()}"
            ),
        )

    def _lose(self, state: ServerState, error: Exception) -> None:
        """Put a server's requests at the head of the queue, and tell the pool that it is lost."""
        self.pending.extendleft(reversed(self._group(state.in_flight)))
        state.in_flight = set()
        state.tokens = 0
        # The epoch is raised before the calls are cancelled, so replies that still arrive count as stale.
        state.epoch += 1
        state.bad_replies = 0
        state.missed_probes = 0
        state.member.client.cancel_all()
        self.pool.lose(state.member, error)
