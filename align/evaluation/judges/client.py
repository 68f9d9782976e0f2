"""Asks an endpoint for judgments, through a cache, and stops at a judge that cannot be used.

Every judgment is cached as soon as it arrives, so that a killed evaluation asks only the rest. A judge that cannot be
reached, or whose replies are unreadable, ends the evaluation with counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.config.endpoint import EndpointConfig
from align.config.judge import EndpointJudge
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.tasks.base import ScoringContext
from align.inference.cached_client import CachedClient, Progress, open_caches, prices_of
from align.inference.requests import Answer, Request

FOLDER = "judgments"
NAME = "judge"
"""Name of the judge among a client's models."""
PROBE_SIZE = 16
"""Judgments to ask for first: where half of them are unreadable, the rest is not paid for."""
QUOTED_CHARACTERS = 200
"""Characters of a reply in an error."""


class JudgmentCaches(NamedTuple):
    """Folders of judgments: the stage's own survives a kill, the shared one spares other runs the same request."""

    folder: Path
    shared: Path | None
    warn: Callable[[str], object]
    """Told of damaged lines."""


def judge_request(identity: dict[str, str], config: EndpointJudge, messages: list[Message]) -> Request:
    """Return the request that asks the judge of this identity; its fields are the key of the cached answer."""
    return Request(
        model=identity,
        messages=messages,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )


def open_client(
    config: EndpointJudge, caches: JudgmentCaches, on_progress: Progress | None = None, processes: int = 1
) -> CachedClient:
    """Return a client that asks one judge through the caches, within ``max_cost``.

    ``processes`` of one stage that ask at the same time share what is left of the budget.
    """
    assert config.endpoint is not None
    shared = None if caches.shared is None else caches.shared / FOLDER
    cache, shared_cache = open_caches(caches.folder / FOLDER, shared, "judgments", caches.warn)
    prices = prices_of(config.endpoint)
    return CachedClient(
        cache,
        shared_cache,
        config.max_cost,
        {} if prices is None else {NAME: prices},
        on_progress,
        processes=processes,
    )


class JudgeClient:
    """One task's judgments by one endpoint."""

    def __init__(self, config: EndpointJudge, task: str, context: ScoringContext) -> None:
        """Open the caches. Raises ``UserError`` when the endpoint's key is not in the environment."""
        from align.inference.endpoint_client import Endpoint

        assert config.endpoint is not None
        self.config = config
        self.task = task
        self.context = context
        self.endpoint_config = config.endpoint
        # A request that the server rejects (a content filter, a length) costs one judgment, not the evaluation.
        self.endpoint = Endpoint(config.endpoint, drop=True, place=f"tasks.{task}.judge.endpoint")
        caches = JudgmentCaches(context.folder, context.shared, context.warn)
        self.client = open_client(config, caches, self._progress)

    def ask(
        self, questions: Sequence[list[Message]], groups: Sequence[str], is_readable: Callable[[str], bool]
    ) -> list[Answer]:
        """Return the judge's replies; ``groups`` names the system or pair of each question.

        Raises ``UserError`` where more than ``max_unreadable`` of any group's judgments are unreadable, early where
        half of the first few are; a failing endpoint raises as ``Endpoint`` does, with counts.
        """
        requests = [judge_request(self.endpoint.identity, self.config, question) for question in questions]
        self.client.expected = len(requests)
        # A judge that cannot answer in the required form shows it in the first few replies.
        replies = self._replies(requests, requests[:PROBE_SIZE])
        unreadable = [reply for reply in replies if not is_readable(reply.text)]
        if len(replies) < len(requests) and 2 * len(unreadable) >= len(replies):
            raise self._unreadable_error("its first questions", unreadable, len(replies), len(requests))
        replies += self._replies(requests, requests[PROBE_SIZE:])
        self.context.progress(len(requests), len(requests), "judgments")
        for group in dict.fromkeys(groups):
            # Per group, since one system's odd answers must not hide in the average of all.
            members = [reply for reply, name in zip(replies, groups, strict=True) if name == group]
            unreadable = [reply for reply in members if not is_readable(reply.text)]
            if len(unreadable) > self.config.max_unreadable * len(members):
                raise self._unreadable_error(group, unreadable, len(members), len(requests))
        return replies

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost so far; those from the shared cache are counted apart."""
        return dict(self.client.usage_json().get(NAME, {}))

    def _replies(self, requests: Sequence[Request], batch: Sequence[Request]) -> list[Answer]:
        """Return the replies to a batch of all ``requests``; an error counts those that are cached."""
        from align.inference.endpoint_client import EndpointLost

        try:
            return self.client.ask(self.endpoint, batch, NAME)
        except (EndpointLost, UserError) as error:
            cached = sum(request.key in self.client.cache for request in requests)
            counts = f"{cached} of {len(requests)} judgments of task '{self.task}' are cached."
            raise type(error)(f"{error} {counts}") from None

    def _unreadable_error(self, group: str, unreadable: Sequence[Answer], replies: int, total: int) -> UserError:
        """Return the error for unreadable replies: counts, reasons, an example, and the remedy."""
        reasons = {
            "refused by the server": sum(bool(reply.error) for reply in unreadable),
            "cut off at judge.max_tokens": sum(not reply.finished and not reply.error for reply in unreadable),
            "declined by the judge": sum(reply.refused and reply.finished for reply in unreadable),
        }
        reasons["without a verdict in the form asked for"] = len(unreadable) - sum(reasons.values())
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        example = next((reply for reply in unreadable if reply.text.strip()), unreadable[0])
        text = example.error or example.text
        # Quoted as ASCII JSON, so that no control character of a reply acts on the terminal.
        quoted = json.dumps(text[:QUOTED_CHARACTERS]) + (" …" if len(text) > QUOTED_CHARACTERS else "")
        return UserError(
            f"tasks.{self.task}: the judge {self.endpoint_config.model} at {self.endpoint_config.url} gave no readable "
            f"verdict in {len(unreadable)} of {replies} judgments of {group} ({total} wanted in all; max_unreadable is "
            f"{self.config.max_unreadable:g}): {listed}. An example: {quoted}. Take a judge that can answer in this "
            "form, raise judge.max_tokens where verdicts are cut off, or raise judge.max_unreadable. Replies are "
            f"cached: to ask a repaired server again, set judge.seed: {self.config.seed + 1}."
        )

    def _progress(self, done: int, total: int, tokens: int) -> None:
        self.context.progress(done, total, "judgments")


JUDGED_LATE = "The judge is asked after every system has answered; start it until then."


def warn_if_unreachable(
    endpoint: EndpointConfig, place: str, warn: Callable[[str], None], remedy: str = JUDGED_LATE
) -> None:
    """Warn when nothing listens at an endpoint's address. A judge is needed late, and may be started until then.

    Raises ``UserError`` when the endpoint's key is not in the environment.
    """
    import httpx

    from align.inference.endpoint_client import Endpoint

    Endpoint(endpoint, place=place)
    try:
        httpx.get(f"{endpoint.url}/models", timeout=3, trust_env=endpoint.url.startswith("https:"))
    except httpx.HTTPError as error:
        warn(f"{place}: nothing answers at {endpoint.url} yet ({type(error).__name__}). {remedy}")
