"""Judges that answer requests: through caches and within a budget, or directly. Torch-free.

A stage's judgments are cached as soon as they arrive, so a killed stage asks only the rest. The judge of an environment
has no cache: the journal of the episodes has its scores.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from align.config.endpoint import EndpointJudge, RewardJudge
from align.data.rows import Message, user
from align.inference.cached_client import Backend, CachedClient, Progress, open_caches, prices_of
from align.inference.endpoint_client import Endpoint
from align.inference.requests import Answer, Request
from align.judges.checkpoint import CheckpointJudge

FOLDER = "judgments"
NAME = "judge"
"""Name of the judge among a client's models."""
QUOTED_CHARACTERS = 200
"""Characters of a reply in an error."""
READY = [user("Reply with the one word: ready")]
"""A test request, sent before anything expensive starts."""


class JudgmentCaches(NamedTuple):
    """Folders of judgments: the stage's own survives a kill, the shared one spares other runs the same request."""

    folder: Path
    shared: Path | None
    warn: Callable[[str], object]
    """Told of damaged lines."""


def unreadable_remedy(config: EndpointJudge, unreadable: Sequence[Answer]) -> str:
    """Return an example of a judge's unreadable replies, and what to change.

    The example is ASCII JSON, so a control character of a reply cannot drive the terminal.
    """
    example = next((reply for reply in unreadable if reply.text.strip()), unreadable[0])
    text = example.error or example.text
    quoted = json.dumps(text[:QUOTED_CHARACTERS]) + (" …" if len(text) > QUOTED_CHARACTERS else "")
    return (
        f"An example: {quoted}. Use a judge that can answer in this form, raise judge.max_tokens if replies are cut "
        "off, or raise judge.max_unreadable. Replies are cached: to ask a repaired server again, set judge.seed: "
        f"{config.seed + 1}."
    )


def judge_request(
    identity: dict[str, str],
    config: EndpointJudge,
    messages: list[Message],
    *,
    sample: int = 0,
    response_format: str = "",
) -> Request:
    """Return the request that asks the judge of this identity; its fields are the key of the cached answer."""
    return Request(
        model=identity,
        messages=messages,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
        sample=sample,
        response_format=response_format,
    )


def open_client(
    config: EndpointJudge, caches: JudgmentCaches, on_progress: Progress | None = None, processes: int = 1
) -> CachedClient:
    """Return a client that asks one judge through the caches, within ``max_cost``.

    ``processes`` of one stage that ask at the same time share what is left of the budget.
    """
    shared = None if caches.shared is None else caches.shared / FOLDER
    cache, shared_cache = open_caches(caches.folder / FOLDER, shared, "judgments", caches.warn)
    prices = None if config.endpoint is None else prices_of(config.endpoint)
    return CachedClient(
        cache,
        shared_cache,
        config.max_cost,
        {} if prices is None else {NAME: prices},
        on_progress,
        processes=processes,
    )


class Judge(Protocol):
    """A model that answers the requests of a scorer."""

    name: str
    """Name of the model in messages."""

    @property
    def is_server(self) -> bool:
        """True for a server, whose answers are waited for; False for a checkpoint in this process."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """Identity of the model in requests."""
        ...

    def ask(self, requests: Sequence[Request], *, fresh: bool = False) -> list[Answer]:
        """Return the answers in the order of the requests; ``fresh`` asks although another run has the answer."""
        ...

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of all attempts and processes of the stage so far."""
        ...

    def close(self) -> None:
        """Free a checkpoint."""
        ...


@dataclass
class CachedJudge:
    """A judge of a stage."""

    name: str
    client: CachedClient
    backend: Backend

    @property
    def is_server(self) -> bool:
        """See ``Judge``."""
        return isinstance(self.backend, Endpoint)

    @property
    def identity(self) -> dict[str, str]:
        """See ``Judge``."""
        return self.backend.identity

    def ask(self, requests: Sequence[Request], *, fresh: bool = False) -> list[Answer]:
        """See ``Judge``. Raises ``UserError`` for a spent budget, ``EndpointLost`` for a server that is gone."""
        return self.client.ask(self.backend, requests, NAME, fresh=fresh)

    def usage(self) -> dict[str, Any]:
        """See ``Judge``."""
        return self.client.usage_of_stage(self.backend, NAME).to_json()

    def close(self) -> None:
        """Free a checkpoint."""
        if isinstance(self.backend, CheckpointJudge):
            self.backend.close()


@dataclass
class DirectJudge:
    """A judge of an environment, whose episodes ask from several threads. There is no cache and no budget."""

    name: str
    backend: Endpoint
    is_server: bool = field(default=True, init=False)
    _slots: threading.BoundedSemaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = threading.BoundedSemaphore(self.backend.config.concurrency)

    @property
    def identity(self) -> dict[str, str]:
        """See ``Judge``."""
        return self.backend.identity

    def ask(self, requests: Sequence[Request], *, fresh: bool = False) -> list[Answer]:
        """See ``Judge``."""
        sink = DirectSink()
        distinct = {request.key: request for request in requests}
        with self._slots:
            self.backend.answer(list(distinct.values()), sink)
        return [sink.answers[request.key] for request in requests]

    def usage(self) -> dict[str, Any]:
        """Return no counts."""
        return {}

    def close(self) -> None:
        """See ``Judge``; a server needs no weights."""


@dataclass
class DirectSink:
    """Receiver of a backend's answers that keeps them only in memory."""

    answers: dict[str, Answer] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def reserve(self, request: Request) -> AsyncIterator[None]:
        """Skip the reservation: there is no budget."""
        yield

    def record(self, answered: list[tuple[Request, Answer]]) -> None:
        """Keep the answers."""
        self.answers |= {request.key: answer for request, answer in answered}

    def record_lost(self, request: Request) -> None:
        """Skip the count."""


def stage_judge(
    config: RewardJudge,
    caches: JudgmentCaches,
    place: str,
    processes: int = 1,
    checkpoint: CheckpointJudge | None = None,
) -> CachedJudge:
    """Return the judge of an entry of a stage: an endpoint if there is no ``checkpoint``.

    Raises ``UserError`` when the endpoint's key is not set.
    """
    backend = checkpoint or _open_endpoint(config, place)
    name = backend.name if isinstance(backend, CheckpointJudge) else backend.config.model
    return CachedJudge(name, open_client(config, caches, processes=processes), backend)


def environment_judge(config: RewardJudge, place: str) -> DirectJudge:
    """Return the judge of an environment. Raises ``UserError`` when the endpoint's key is not set."""
    endpoint = _open_endpoint(config, place)
    return DirectJudge(endpoint.config.model, endpoint)


def _open_endpoint(config: RewardJudge, place: str) -> Endpoint:
    assert config.endpoint is not None
    # A request that the server rejects (a content filter, a length) costs one judgment, not the run.
    return Endpoint(config.endpoint, drop=True, place=f"{place}.judge.endpoint")
