"""Requests answered through a cache, within a budget, their tokens and cost counted. Torch-free.

An answer comes from the stage's own cache, else from a cache that runs share, else from the model; each is kept in the
stage's own cache the moment it is there, so that a killed stage asks only what is left and counts alike.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from align.errors import UserError
from align.inference.requests import Answer, Request, RequestCache

MILLION = 1_000_000
TURN_TOKENS, TEMPLATE_TOKENS = 16, 64
"""What a chat template may add to a message, and to a conversation (a default system prompt): for bounds on costs."""

Progress = Callable[[int, int, int], None]
"""Called with requests answered, requests wanted, and tokens sampled, all of this ``Asker``'s life."""


class Prices(NamedTuple):
    """Of a million tokens each."""

    input: float
    output: float

    def cost(self, request: Request, answer: Answer) -> float:
        """Of an answer; what the server does not count is taken at its bound."""
        prompt, completion = bounds(request)
        prompt = prompt if answer.prompt_tokens is None else answer.prompt_tokens
        completion = completion if answer.completion_tokens is None else answer.completion_tokens
        return (prompt * self.input + completion * self.output) / MILLION

    def bound(self, request: Request) -> float:
        """What a request can cost at most."""
        prompt, completion = bounds(request)
        return (prompt * self.input + completion * self.output) / MILLION


def bounds(request: Request) -> tuple[int, int]:
    """Tokens that a request and its answer have at most: no token is shorter than a byte."""
    content = sum(len((message.get("content") or "").encode()) + TURN_TOKENS for message in request.messages)
    return content + TEMPLATE_TOKENS, request.max_tokens


class Desk(Protocol):
    """What a backend is given beside the requests."""

    def admit(self, request: Request) -> contextlib.AbstractAsyncContextManager[None]:
        """Entered before a request is sent, left when it is settled. Raises ``UserError`` when money would run out."""
        ...

    def keep(self, answered: list[tuple[Request, Answer]]) -> None:
        """Take answers: together on disk, or not at all."""
        ...

    def lose(self, request: Request) -> None:
        """Hear of an attempt that was given up and may have been answered and charged for."""
        ...


class Backend(Protocol):
    """A model that answers."""

    @property
    def identity(self) -> dict[str, str]:
        """What stands for it in requests."""
        ...

    def answer(self, requests: list[Request], desk: Desk) -> None:
        """Hand an answer to each request to ``desk.keep``, in any order."""
        ...


@dataclass
class Usage:
    """What the answers used so far took, ``copied`` ones (from the shared cache) apart: they cost nothing again."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    copied: int = 0
    copied_prompt_tokens: int = 0
    copied_completion_tokens: int = 0
    uncounted: int = 0
    """Answers, of all, whose server did not say how many tokens they took."""
    failed: int = 0
    cost: float | None = None

    def add(self, request: Request, answer: Answer, copied: bool, prices: Prices | None) -> None:
        """Count one answer."""
        if answer.error:
            self.failed += 1
            return
        prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
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
        """For the ledger; the cost to a millionth, and left out where no price is known."""
        found = {name: value for name, value in asdict(self).items() if name != "cost"}
        return found if self.cost is None else found | {"cost": round(self.cost, 6)}


@dataclass
class Budget:
    """Money that may be spent in all, earlier attempts of the stage included."""

    most: float | None
    spent: float = 0.0
    held: float = 0.0
    """Bounds of what is under way."""

    @contextlib.asynccontextmanager
    async def hold(self, bound: float) -> AsyncIterator[None]:
        """Set ``bound`` aside while a request is under way. Raises ``UserError`` when it is not there."""
        while self.most is not None and self.spent + self.held + bound > self.most:
            if self.held == 0:
                raise UserError(
                    f"max_cost {self.most:g} is reached: {self.spent:.6g} spent, and the next request may cost "
                    f"{bound:.6g}. What was answered is kept: raise max_cost and run again to go on."
                )
            await asyncio.sleep(0.02)
        self.held += bound
        try:
            yield
        finally:
            # Sums of floats drift: nothing under way is exactly nothing.
            self.held = max(0.0, self.held - bound) if self.held - bound > 1e-12 else 0.0


@dataclass
class Asker:
    """Answers requests of one stage, from one model or several."""

    cache: RequestCache
    shared: RequestCache | None = None
    max_cost: float | None = None
    prices: dict[str, Prices] = field(default_factory=dict)
    """By the name under which a backend's usage is counted."""
    on_progress: Progress | None = None
    expected: int = 0
    """Requests that will be asked in all, as far as is known."""

    def __post_init__(self) -> None:
        self.budget = Budget(self.max_cost)
        self.usage: dict[str, Usage] = {}
        self.new = 0
        """Requests that this process asked."""
        self._counted: set[bytes] = set()
        self._spent_for: list[dict[str, str]] = []

    def ask(
        self, backend: Backend, requests: Sequence[Request], name: str = "model", *, fresh: bool = False
    ) -> list[Answer]:
        """The answers, in the order of ``requests``; equal requests share one. Usage counts under ``name``.

        ``fresh`` leaves the shared cache alone: for a question that is asked to see whether there is an answer.
        """
        self._count_earlier(backend, name)
        self.expected = max(self.expected, len(self._counted) + len(requests))
        wanted = {request.key: request for request in requests if request.key not in self.cache}
        if self.shared is not None and not fresh:
            known = [(wanted[key], found.answer) for key in wanted if (found := self.shared.get(key)) is not None]
            self.cache.put(known, copied=True)
        left = [request for key, request in wanted.items() if key not in self.cache]
        desk = _Desk(self, name)
        if left:
            backend.answer(left, desk)
            self.cache.sync()
        usage, prices = self.usage.setdefault(name, Usage()), self.prices.get(name)
        answers = []
        for request in requests:
            found = self.cache.get(request.key)
            if found is None and request.key not in desk.failed:
                raise RuntimeError(f"the backend of '{name}' left a request without an answer")
            answer = desk.failed[request.key] if found is None else found.answer
            if (short := bytes.fromhex(request.key)) not in self._counted:
                self._counted.add(short)
                usage.add(request, answer, found is not None and found.copied, prices)
            answers.append(answer)
        self.report(0)
        return answers

    def _count_earlier(self, backend: Backend, name: str) -> None:
        """What earlier attempts of the stage spent on this model."""
        prices = self.prices.get(name)
        if prices is None or backend.identity in self._spent_for:
            return
        self._spent_for.append(backend.identity)
        mine: Iterable[tuple[Request, Answer]] = (one for one in self.cache.asked() if one[0].model == backend.identity)
        self.budget.spent += sum(prices.cost(request, answer) for request, answer in mine)
        self.budget.spent += sum(prices.bound(lost) for lost in self.cache.lost if lost.model == backend.identity)

    def report(self, under_way: int) -> None:
        """Tell how far it is; ``under_way`` answers are there that ``ask`` has not yet given back."""
        if self.on_progress is not None:
            tokens = sum(one.completion_tokens + one.copied_completion_tokens for one in self.usage.values())
            done = len(self._counted) + under_way
            self.on_progress(done, max(done, self.expected), tokens)

    def usage_json(self) -> dict[str, Any]:
        """By model, for the ledger: the same whether or not the stage was killed on its way."""
        return {name: usage.to_json() for name, usage in self.usage.items()}


class _Desk:
    """One ``ask`` of one backend."""

    def __init__(self, asker: Asker, name: str) -> None:
        self.asker, self.prices = asker, asker.prices.get(name)
        self.failed: dict[str, Answer] = {}
        self.done = 0

    def admit(self, request: Request) -> contextlib.AbstractAsyncContextManager[None]:
        return self.asker.budget.hold(0.0 if self.prices is None else self.prices.bound(request))

    def keep(self, answered: list[tuple[Request, Answer]]) -> None:
        good = [(request, answer) for request, answer in answered if not answer.error]
        self.failed |= {request.key: answer for request, answer in answered if answer.error}
        self.asker.cache.put(good)
        if self.asker.shared is not None:
            self.asker.shared.put(good)
        if self.prices is not None:
            self.asker.budget.spent += sum(self.prices.cost(*one) for one in good)
        self.asker.new += len(good)
        self.done += len(answered)
        self.asker.report(self.done)

    def lose(self, request: Request) -> None:
        self.asker.cache.lose(request)
        if self.prices is not None:
            self.asker.budget.spent += self.prices.bound(request)
