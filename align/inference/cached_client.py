"""Client that answers requests through a cache, within a budget, and counts tokens and cost. Torch-free.

An answer comes from the stage's own cache, else from a cache that runs share, else from the model. Each answer is
written to the stage's cache as soon as it comes, so a killed stage sends only the remaining requests and arrives
at the same counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from align.config.endpoint import EndpointConfig
from align.errors import UserError
from align.inference.requests import Answer, Request, RequestCache

MILLION = 1_000_000
CALL_FORM = 2
"""Size of a call or a tool's schema in a prompt, at most, relative to its JSON's size."""
TURN_TOKENS = 16
TEMPLATE_TOKENS = 64
"""Tokens that a chat template may add to a message, and to a conversation (a default system prompt)."""

Progress = Callable[[int, int, int], None]
"""The callback gets requests answered, requests expected, and tokens sampled, since the client was made."""


class Prices(NamedTuple):
    """Prices per million tokens."""

    input: float
    output: float

    def cost(self, request: Request, answer: Answer) -> float:
        """Return the cost of an answer. Tokens that the server did not count count with their bound."""
        prompt, completion = bounds(request)
        prompt = prompt if answer.prompt_tokens is None else answer.prompt_tokens
        completion = completion if answer.completion_tokens is None else answer.completion_tokens
        return (prompt * self.input + completion * self.output) / MILLION

    def bound(self, request: Request) -> float:
        """Return the highest cost of a request at a server that keeps to ``max_tokens``."""
        prompt, completion = bounds(request)
        return (prompt * self.input + completion * self.output) / MILLION

    def surplus(self, request: Request, answer: Answer) -> float:
        """Return what an answer costs beyond the bound; thinking, for example, may not count towards ``max_tokens``."""
        prompt, completion = bounds(request)
        more_prompt = max(0, (answer.prompt_tokens or 0) - prompt)
        more_completion = max(0, (answer.completion_tokens or 0) - completion)
        return (more_prompt * self.input + more_completion * self.output) / MILLION


def bounds(request: Request) -> tuple[int, int]:
    """Return the most tokens that a request and its answer can have: no token is shorter than a byte."""
    # A byte per token is the worst case of any tokenizer.
    content = sum(len((message.get("content") or "").encode()) + TURN_TOKENS for message in request.messages)
    # Templates write calls and schemas in their own forms.
    calls = sum(len((message.get("tool_calls") or "").encode()) for message in request.messages)
    schemas = len(request.tools.encode())
    return content + CALL_FORM * (calls + schemas) + TEMPLATE_TOKENS, request.max_tokens


class Sink(Protocol):
    """Receiver of a backend's answers."""

    def reserve(self, request: Request) -> contextlib.AbstractAsyncContextManager[None]:
        """Reserve the request's highest cost inside the context."""
        ...

    def record(self, answered: list[tuple[Request, Answer]]) -> None:
        """Receive answers."""
        ...

    def record_lost(self, request: Request) -> None:
        """Count an attempt that was given up."""
        ...


class Backend(Protocol):
    """A model that answers."""

    @property
    def identity(self) -> dict[str, str]:
        """Return the model's identity in requests."""
        ...

    def answer(self, requests: list[Request], sink: AnswerSink) -> None:
        """Answer each request, in any order, by ``sink.record``."""
        ...


@dataclass
class Usage:
    """Tokens and cost of the answers so far. ``copied`` ones, from the shared cache, are free."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    copied: int = 0
    copied_prompt_tokens: int = 0
    copied_completion_tokens: int = 0
    uncounted: int = 0
    """Answers, copied ones included, whose server did not count their tokens."""
    failed: int = 0
    cost: float | None = None

    def add(self, request: Request, answer: Answer, copied: bool, prices: Prices | None) -> None:
        """Count one answer."""
        if answer.error:
            self.failed += 1
            return
        prompt = answer.prompt_tokens or 0
        completion = answer.completion_tokens or 0
        self.uncounted += answer.prompt_tokens is None or answer.completion_tokens is None
        if copied:
            self.copied += 1
            self.copied_prompt_tokens += prompt
            self.copied_completion_tokens += completion
            return
        self.requests += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if prices is not None:
            self.cost = (self.cost or 0.0) + prices.cost(request, answer)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the ledger; the cost to a millionth, and omitted if no price is known."""
        fields = {name: value for name, value in asdict(self).items() if name != "cost"}
        return fields if self.cost is None else fields | {"cost": round(self.cost, 6)}


@dataclass
class Budget:
    """Money that may be spent in all, earlier attempts of the stage included."""

    limit: float | None
    spent: float = 0.0
    surplus: dict[str, float] = field(default_factory=dict)
    """Name of a backend → the most that an answer has cost beyond its bound."""
    _bounds: float = 0.0
    """Sum of the bounds of the requests in flight."""
    _in_flight: Counter[str] = field(default_factory=Counter)
    """Name of a backend → its requests in flight."""

    @property
    def reserved(self) -> float:
        """The highest cost of the requests in flight, as far as earlier answers tell."""
        if not self._in_flight.total():
            return 0.0  # exactly: sums of floats drift
        return self._bounds + sum(count * self.surplus.get(name, 0.0) for name, count in self._in_flight.items())

    def observe(self, name: str, surplus: float) -> None:
        """Raise the reservations of a backend, those in flight included, to an answer's cost beyond its bound."""
        self.surplus[name] = max(surplus, self.surplus.get(name, 0.0))

    @contextlib.asynccontextmanager
    async def reserve(self, bound: float, name: str = "model") -> AsyncIterator[None]:
        """Reserve ``bound`` and the backend's surplus while a request is in flight.

        Raises ``UserError`` if too little is left. Requests in flight mostly cost less than their bounds, so others
        wait for them before that is decided.
        """
        while self.limit is not None and self.spent + self.reserved + bound + self.surplus.get(name, 0.0) > self.limit:
            if not self._in_flight.total():
                raise self._spent_error(bound, self.surplus.get(name, 0.0))
            await asyncio.sleep(0.02)
        self._bounds += bound
        self._in_flight[name] += 1
        try:
            yield
        finally:
            self._in_flight[name] -= 1
            # With no request in flight the sum is set to 0, because sums of floats leave a remainder.
            self._bounds = self._bounds - bound if self._in_flight.total() else 0.0

    def _spent_error(self, bound: float, surplus: float) -> UserError:
        reason = f" ({surplus:.6g} of it because answers were billed for more than max_tokens)" if surplus else ""
        return UserError(
            f"max_cost {self.limit:g} is reached: {self.spent:.6g} spent, and the next request may cost "
            f"{bound + surplus:.6g}{reason}. What was answered is kept: raise max_cost and run again to go on."
        )


@dataclass
class CachedClient:
    """Answers the requests of one stage, from one model or several, through caches and within a budget."""

    cache: RequestCache
    """The stage's own cache."""
    shared: RequestCache | None = None
    """A cache that several runs share."""
    max_cost: float | None = None
    prices: dict[str, Prices] = field(default_factory=dict)
    """Name of a backend, as in ``ask`` → its prices."""
    on_progress: Progress | None = None
    expected: int = 0
    """Requests in all, as far as is known."""
    processes: int = 1
    """Processes of the stage that ask at the same time. Each may spend its part of what earlier attempts left."""

    def __post_init__(self) -> None:
        self.budget = Budget(self.max_cost)
        self.usage: dict[str, Usage] = {}
        self.new = 0
        """Requests that this process sent."""
        self._counted: set[bytes] = set()
        """Keys of requests whose usage is counted."""
        self._counted_backends: list[dict[str, str]] = []
        """Identities of backends whose earlier cost is in the budget."""

    def ask(
        self, backend: Backend, requests: Sequence[Request], name: str = "model", *, fresh: bool = False
    ) -> list[Answer]:
        """Return the answers in the order of ``requests``; equal requests share one. Usage counts under ``name``.

        ``fresh`` does not read the shared cache, for a question that tests whether the model answers.
        """
        self._count_earlier_cost(backend, name)
        # The expected number may grow while a stage runs, never shrink: progress would go backwards.
        self.expected = max(self.expected, len(self._counted) + len(requests))
        # 1. Requests that the stage's own cache lacks: copy what the shared cache has.
        missing = {request.key: request for request in requests if request.key not in self.cache}
        if self.shared is not None and not fresh:
            self._copy_shared(self.shared, missing)
        # 2. Have the backend answer the rest. The sink writes each answer to the caches as it comes.
        unanswered = [request for key, request in missing.items() if key not in self.cache]
        sink = AnswerSink(self, name)
        if unanswered:
            backend.answer(unanswered, sink)
            self.cache.sync()
        # 3. Read all answers from the cache, and count the usage of each request once. A model without any request is
        #    in the usage as well, with zeros.
        self.usage.setdefault(name, Usage())
        answers = [self._take_answer(request, sink, name) for request in requests]
        self.report(0)
        return answers

    def _copy_shared(self, shared: RequestCache, missing: dict[str, Request]) -> None:
        copies = []
        for key, request in missing.items():
            lookup = shared.get(key)
            if lookup is not None:
                copies.append((request, lookup.answer))
        self.cache.put(copies, copied=True)

    def _take_answer(self, request: Request, sink: AnswerSink, name: str) -> Answer:
        """Return the answer to one request, and count its usage unless that was done before."""
        lookup = self.cache.get(request.key)
        if lookup is None and request.key not in sink.failed:
            raise RuntimeError(f"the backend of '{name}' left a request without an answer")
        answer = sink.failed[request.key] if lookup is None else lookup.answer
        key = bytes.fromhex(request.key)
        if key not in self._counted:
            self._counted.add(key)
            self.usage[name].add(request, answer, lookup is not None and lookup.copied, self.prices.get(name))
        return answer

    def _count_earlier_cost(self, backend: Backend, name: str) -> None:
        """Add to the budget, once, what earlier attempts of the stage spent on this model."""
        prices = self.prices.get(name)
        if prices is None or backend.identity in self._counted_backends:
            return
        self._counted_backends.append(backend.identity)
        for request, answer in self.cache.asked():
            if request.model == backend.identity:
                self.count_cost(name, prices, request, answer)
        for request in self.cache.lost:
            if request.model == backend.identity:
                self.count_lost(name, prices, request)
        if self.max_cost is not None:
            # Processes do not see each other's costs, so each gets an equal part of what is left.
            remaining = max(0.0, self.max_cost - self.budget.spent)
            self.budget.limit = self.max_cost if self.processes == 1 else self.budget.spent + remaining / self.processes

    def count_cost(self, name: str, prices: Prices, request: Request, answer: Answer) -> None:
        """Add an answer's cost to the budget."""
        self.budget.spent += prices.cost(request, answer)
        self.budget.observe(name, prices.surplus(request, answer))

    def count_lost(self, name: str, prices: Prices, request: Request) -> None:
        """Add an attempt that was given up to the budget, at its highest cost: it may have been charged for."""
        self.budget.spent += prices.bound(request) + self.budget.surplus.get(name, 0.0)

    def report(self, answered: int) -> None:
        """Report progress; ``answered`` answers are there that ``ask`` has not returned yet."""
        if self.on_progress is not None:
            tokens = sum(usage.completion_tokens + usage.copied_completion_tokens for usage in self.usage.values())
            completed = len(self._counted) + answered
            self.on_progress(completed, max(completed, self.expected), tokens)

    def usage_of_stage(self, backend: Backend, name: str = "model") -> Usage:
        """Return the usage of a model by all attempts and processes of the stage, as the folder of its cache has it."""
        self.cache.sync()
        usage = Usage()
        prices = self.prices.get(name)
        # Open the cache again, since this process has not read what the others have written meanwhile.
        for request, answer in RequestCache(self.cache.folder).asked():
            if request.model == backend.identity:
                usage.add(request, answer, copied=False, prices=prices)
        return usage

    def usage_json(self) -> dict[str, Any]:
        """Return the usage by name, for the ledger: the same whether or not the stage was killed on its way."""
        return {name: usage.to_json() for name, usage in self.usage.items()}


def open_caches(
    folder: Path, shared: Path | None, content: str, warn: Callable[[str], object]
) -> tuple[RequestCache, RequestCache | None]:
    """Open a stage's cache, and the cache that runs share if there is one.

    ``warn`` is called for damaged lines; ``content`` says what is lost with them.
    """
    caches = RequestCache(folder), None if shared is None else RequestCache(shared)
    for cache in caches:
        if cache is not None and cache.unreadable:
            warn(f"{cache.unreadable} lines in {cache.folder} are damaged; their {content} are asked for again")
    return caches


def prices_of(endpoint: EndpointConfig) -> Prices | None:
    """Return an endpoint's prices; None if they are not known."""
    if endpoint.price_input is None or endpoint.price_output is None:
        return None
    return Prices(endpoint.price_input, endpoint.price_output)


class AnswerSink:
    """Receiver of a backend's answers during one ``ask``: writes them to the caches and counts their cost."""

    def __init__(self, client: CachedClient, name: str) -> None:
        self.client = client
        self.name = name
        self.prices = client.prices.get(name)
        self.failed: dict[str, Answer] = {}
        """Key → answer with an error, which no cache holds."""
        self.done = 0

    def reserve(self, request: Request) -> contextlib.AbstractAsyncContextManager[None]:
        """Reserve the request's highest cost inside the context. Raises ``UserError`` when the budget is exceeded."""
        return self.client.budget.reserve(0.0 if self.prices is None else self.prices.bound(request), self.name)

    def record(self, answered: list[tuple[Request, Answer]]) -> None:
        """Write answers to the caches: all of them, or none."""
        # Failed requests stay out of the caches: another attempt may succeed.
        good = [(request, answer) for request, answer in answered if not answer.error]
        self.failed |= {request.key: answer for request, answer in answered if answer.error}
        self.client.cache.put(good)
        if self.client.shared is not None:
            self.client.shared.put(good)
        if self.prices is not None:
            for request, answer in good:
                self.client.count_cost(self.name, self.prices, request, answer)
        self.client.new += len(good)
        self.done += len(answered)
        self.client.report(self.done)

    def record_lost(self, request: Request) -> None:
        """Count an attempt that was given up, but may have been answered and charged for."""
        self.client.cache.record_lost(request)
        if self.prices is not None:
            self.client.count_lost(self.name, self.prices, request)
