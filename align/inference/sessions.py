"""Sessions: turns of many episodes, each sampled as soon as it is submitted, while tools work for other episodes.

vLLM decodes turns together however they come, in this process or behind servers; transformers samples what has been
submitted as one batch. Every turn has its own seed, so which turns are decoded together changes no sample, but for
the rounding of sums. The next turn of an episode finds the keys and values of everything before it in vLLM's prefix
cache, unless others have pushed them out. Leaves out conversations and tools, which are the caller's.

New weights for servers while episodes are played: each reads them when the turns that it has have ended.

So every turn has the weights of one version. A server gets no turn from the offer of new weights until it holds them;
servers do not wait for each other. Excluded: writing weights, and changes of them between sessions (``pool.py``).
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from align.inference.protocol import BatchEngine, Response, RolloutEngine
from align.inference.protocol import Session as Session
from align.inference.protocol import TurnRequest as TurnRequest
from align.inference.servers.dispatch import Dispatcher, ServerRequest
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server import COMPLETIONS, FAULTS, Member
from align.inference.servers.server_client import POLL_SECONDS, WeightsChanged
from align.inference.vllm import CACHE, WEIGHTS, VllmEngine
from align.inference.vllm_internals import VllmChanged


def open_session(engine: RolloutEngine, temperature: float, top_p: float = 1.0) -> Session:
    """Return a session of ``engine``; close it before the engine's weights change. Temperature 0 is greedy."""
    if isinstance(engine, VllmEngine):
        return VllmSession(engine, temperature, top_p)
    if isinstance(engine, PoolEngine):
        return PoolSession(engine, temperature, top_p)
    if isinstance(engine, BatchEngine):
        return LockstepSession(engine, temperature, top_p)
    raise TypeError(f"{type(engine).__name__} has no sessions")


class CacheUse:
    """Prompt tokens of the turns that came back, and how many of them were in the engine's cache."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = 0

    def count(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """Add a turn, unless its engine does not tell."""
        if cached_tokens is not None:
            self.prompt_tokens += prompt_tokens
            self.cached_tokens += cached_tokens

    def statistics(self) -> dict[str, float] | None:
        """Return the share that was in the cache; None before a turn was counted."""
        return {"prefix_hit_rate": self.cached_tokens / self.prompt_tokens} if self.prompt_tokens else None


class VllmSession(Session):
    """Turns by vLLM in this process: each joins the batch between two decoding steps, and leaves it when it ends.

    The engine has one session at a time. It stays awake from the first turn until the session is closed, on a shared
    GPU as well, where its sleep would drop the prefix cache.
    """

    is_lockstep = False

    def __init__(self, engine: VllmEngine, temperature: float, top_p: float) -> None:
        _refuse_second(engine.session)
        self.engine = engine
        self.temperature = temperature
        self.top_p = top_p
        self.steps = engine.steps
        self.cache_use = CacheUse()
        self._keys: dict[str, int] = {}
        """vLLM's name of a request in flight → key of its turn."""
        engine.session = self

    @property
    def pending(self) -> int:
        """Turns in flight."""
        return len(self._keys)

    def submit(self, request: TurnRequest) -> None:
        """Add a turn before the next decoding step. Raises ``ValueError``, as the protocol has it."""
        _refuse_closed(self.engine.session is not self)
        _check_request(request, request.key in self._keys.values(), self.engine.max_length)
        params = self.engine.sampling_params(request, self.temperature, self.top_p)
        with self.engine.call("generate"):
            self.engine.sleep_mode.wake(WEIGHTS, CACHE)
            self._keys[self.steps.add(request.prompt, params)] = request.key

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Decode until a turn ends, one step at least; returns the turns that ended with that step."""
        if not self._keys:
            return []
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.engine.call("generate"):
            outputs = self.steps.step()
            while not outputs and (deadline is None or time.monotonic() < deadline):
                outputs = self.steps.step()
        if not outputs:
            return []
        if not outputs.keys() <= self._keys.keys():
            raise VllmChanged("name of a request")
        for output in outputs.values():
            self.cache_use.count(len(output.prompt_token_ids), output.num_cached_tokens)
        keys = [self._keys.pop(name) for name in outputs]
        return list(zip(keys, self.engine.responses(list(outputs.values())), strict=True))

    def cache_statistics(self) -> dict[str, float] | None:
        """Return the share of prompt tokens that vLLM took from its cache."""
        return self.cache_use.statistics()

    def close(self) -> None:
        """Abort what is in flight, and let the engine sleep."""
        if self.engine.session is not self:
            return
        self.engine.session = None
        with self.engine.call("close"):
            if self._keys:
                self.steps.abort(list(self._keys))
                self._keys.clear()
            self.engine.sleep_mode.sleep()


class PoolSession(Session):
    """Turns by a pool of servers: each turn goes to a server, and to another if that is lost. One session at a time.

    An episode's turns go to the server that had the last one, and first turns of one prompt to one server, as long as
    it has room: it has their beginning in its cache. Servers read weights that the pool is offered meanwhile between
    two turns.
    """

    is_lockstep = False

    def __init__(self, pool: PoolEngine, temperature: float, top_p: float) -> None:
        """Raises as ``PoolEngine.generate`` if no server is ready or one holds other weights."""
        _refuse_second(pool.session)
        self.pool = pool
        self.temperature = temperature
        self.top_p = top_p
        pool.check_weights()
        pool.await_ready()
        self.dispatcher = Dispatcher(pool, COMPLETIONS, [], pool.batch_size)
        self.rolling_update = RollingUpdate(pool, self.dispatcher)
        self.cache_use = CacheUse()
        self._requests: dict[int, TurnRequest] = {}
        """Turns in flight, by the dispatcher's index."""
        pool.session = self

    @property
    def pending(self) -> int:
        """Turns in flight."""
        return len(self._requests)

    def submit(self, request: TurnRequest) -> None:
        """Send a turn, or queue it if no server has room. Raises ``ValueError``, as the protocol has it."""
        _refuse_closed(self.pool.session is not self)
        self.rolling_update.advance()
        is_in_flight = any(request.key == turn.key for turn in self._requests.values())
        _check_request(request, is_in_flight, self.pool.spec.max_length)
        body = self.pool.members[0].engine.sampling_request(request, self.temperature, self.top_p)
        # The server of the episode's last turn comes first, then a server that had the same prompt.
        affinity = (("episode", request.key), ("prompt", hash(tuple(request.prompt))))
        index = self.dispatcher.submit(ServerRequest(body, _parse_turn, group=request.key, affinity=affinity))
        self._requests[index] = request

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return turns that came back, once the servers' weights are known to be those that were sampled from.

        Raises as ``PoolEngine.generate``. While no server is ready it waits for a server, whatever the timeout.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self._requests:
            self.rolling_update.advance()
            seconds_left = deadline - time.monotonic()
            # Waiting is short, so weights that are offered meanwhile are seen.
            outputs = self.dispatcher.poll(min(POLL_SECONDS, max(0.0, seconds_left)))
            if outputs:
                self._check_weights()
                return self._build_responses(outputs)
            if seconds_left <= 0:
                break
        return []

    def _build_responses(self, turns_by_index: dict[int, ServedTurn]) -> list[tuple[int, Response]]:
        """Return the turns that came back, with the update of their weights if the pool was told it."""
        requests = [self._requests.pop(index) for index in turns_by_index]
        turns = list(turns_by_index.values())
        for request, turn in zip(requests, turns, strict=True):
            self.cache_use.count(len(request.prompt), turn.cached_tokens)
        responses = self.pool.members[0].engine.build_responses([turn.sample for turn in turns], 1)
        updates = [self.pool.weights_updates.get(turn.version) for turn in turns]
        return [
            (request.key, replace(response, weights_update=update))
            for request, (response,), update in zip(requests, responses, updates, strict=True)
        ]

    def _check_weights(self) -> None:
        """Raise ``WeightsChanged`` if a server holds other weights than it was given; a server without answer is lost.

        It runs before turns are handed out, not when the session ends: the caller may store them at once.
        """
        lost: list[tuple[Member, Exception]] = []
        self.pool.check_weights(sampled=True, lose=lambda member, error: lost.append((member, error)))
        for member, error in lost:
            self.dispatcher.lose(member, error)

    def cache_statistics(self) -> dict[str, float] | None:
        """Return the share of prompt tokens that servers took from their caches; None if they do not tell.

        Servers tell that were started with ``--enable-prompt-tokens-details``, as a run's servers are.
        """
        return self.cache_use.statistics()

    def close(self) -> None:
        """Cancel what is in flight; servers drop the requests behind it."""
        if self.pool.session is not self:
            return
        self.pool.session = None
        self._requests.clear()
        # Canceling would end the reading of weights as well.
        self.rolling_update.wait()
        self.dispatcher.cancel()


class LockstepSession(Session):
    """Turns in batches, by transformers here or by engines of a Ray cluster.

    The same set of turns gives the same responses bit for bit, in whatever order it was submitted.
    """

    is_lockstep = True

    def __init__(self, engine: BatchEngine, temperature: float, top_p: float) -> None:
        self.engine = engine
        self.temperature = temperature
        self.top_p = top_p
        self._requests: dict[int, TurnRequest] = {}
        """Turns for the next batch, by key."""
        self._is_closed = False

    @property
    def pending(self) -> int:
        """Turns that the next ``poll`` samples."""
        return len(self._requests)

    def submit(self, request: TurnRequest) -> None:
        """Keep a turn for the next ``poll``. Raises ``ValueError``, as the protocol has it."""
        _refuse_closed(self._is_closed)
        _check_request(request, request.key in self._requests)
        self._requests[request.key] = request

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Sample every turn that was submitted, to its end, and return all of them by key, whatever the timeout."""
        # Tools end in any order. Rows of a batch must not, or its sums are rounded in another order.
        requests = [self._requests[key] for key in sorted(self._requests)]
        self._requests.clear()
        responses = self.engine.sample(requests, self.temperature, self.top_p)
        return [(request.key, response) for request, response in zip(requests, responses, strict=True)]

    def close(self) -> None:
        """Drop what was submitted."""
        self._is_closed = True
        self._requests.clear()


@dataclass(frozen=True)
class ServedTurn:
    """A turn as a server of a pool gave it."""

    sample: tuple[list[int], list[float]]
    """Tokens and log-probabilities."""
    cached_tokens: int | None
    """Tokens of the prompt that were in the cache; None if the server does not tell."""
    version: int
    """Version of the weights that the server holds: it reads no others before its turns have come back."""


def _parse_turn(member: Member, body: dict[str, Any], answer: Any) -> ServedTurn:
    return ServedTurn(member.engine.parse_sample(body, answer), member.engine.cached_tokens(answer), member.version)


def _refuse_second(session: Session | None) -> None:
    if session is not None:
        raise RuntimeError("this engine has an open session; close it first")


def _refuse_closed(is_closed: bool) -> None:
    if is_closed:
        raise RuntimeError("this session is closed")


def _check_request(request: TurnRequest, is_in_flight: bool, max_length: int | None = None) -> None:
    """Raise ``ValueError`` for a turn that the engine does not sample, with sequences of at most ``max_length``."""
    if is_in_flight:
        raise ValueError(f"episode {request.key} has a turn in flight")
    sizes = f"{len(request.prompt)} tokens of prompt and max_tokens {request.max_tokens}"
    if not request.prompt or request.max_tokens < 1:
        raise ValueError(f"episode {request.key}: a turn needs a prompt and room for a token, and has {sizes}")
    if max_length is not None and len(request.prompt) + request.max_tokens > max_length:
        raise ValueError(f"episode {request.key}: the engine takes {max_length} tokens, and a turn has {sizes}")


class RollingUpdate:
    """Sends the weights that a pool was offered to its servers, one at a time. Use it from the session's thread."""

    def __init__(self, pool: PoolEngine, dispatcher: Dispatcher) -> None:
        self.pool = pool
        self.dispatcher = dispatcher
        self._loads: dict[Member, Future[None]] = {}
        """Servers that read weights, or have done so since the last look."""
        self._threads: ThreadPoolExecutor | None = None

    def advance(self) -> None:
        """Go over to the newest weights, and have servers without a turn read them in the background.

        Every turn that came back must have been checked before (``PoolEngine.check_weights``): reading replaces what it
        was sampled from. A server that cannot read them is lost. Raises ``WeightsChanged`` if one held others.
        """
        self._take_results()
        self.pool.take_offer()
        for state in self.dispatcher.servers:
            member = state.member
            is_outdated = member.ready and member.version != self.pool.version
            if is_outdated and not state.in_flight and member not in self._loads:
                self._begin(member)

    def wait(self) -> None:
        """Wait until no server reads weights, and lose those that could not."""
        wait(self._loads.values())
        if self._threads is not None:
            self._threads.shutdown()
        # No turn is sampled any more, so a server that held others' weights does no harm.
        self._take_results(is_over=True)

    def _take_results(self, is_over: bool = False) -> None:
        for member in [member for member, load in self._loads.items() if load.done()]:
            # Its weights were not compared until now: a load that failed halfway would look like weights of others.
            member.is_loading = False
            try:
                self._loads.pop(member).result()
            except WeightsChanged as error:
                # A server that was restarted has spoiled no turn: those that it had were checked.
                if not (error.restarted or is_over):
                    raise
                self.dispatcher.lose(member, error)
            except FAULTS as error:
                self.dispatcher.lose(member, error)

    def _begin(self, member: Member) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self.pool.members), thread_name_prefix="vllm-rolling-update")
        version = self.pool.version
        member.is_loading = True

        def load() -> None:
            try:
                # This is the last chance to compare the old weights: reading replaces them.
                member.engine.check_weights(content=True)
                member.read(version)
            finally:
                # The session may be waiting for replies, with turns that this server can run now.
                self.dispatcher.wake()

        self._loads[member] = self._threads.submit(load)
