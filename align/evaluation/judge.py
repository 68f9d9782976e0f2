"""A client that asks a judge for one task's judgments. Torch-free.

A judge that cannot be reached, or whose replies are unreadable, ends the evaluation with counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align.config.endpoint import EndpointConfig, EndpointJudge
from align.data.rows import Message
from align.errors import UserError
from align.inference.requests import Answer, Request
from align.judges.client import NAME, JudgmentCaches, judge_request, open_client, unreadable_remedy

if TYPE_CHECKING:
    from align.evaluation.scoring import ScoringContext

PROBE_SIZE = 16
"""Judgments to ask for first: if half of them are unreadable, the rest is not paid for."""
JUDGED_LATE = "The judge is asked after every system has answered; start it until then."


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

        Raises ``UserError`` if more than ``max_unreadable`` of any group's judgments are unreadable, early if
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
        """Return requests, tokens and cost so far; those from the shared cache are counted separately."""
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
        return UserError(
            f"tasks.{self.task}: the judge {self.endpoint_config.model} at {self.endpoint_config.url} gave no readable "
            f"verdict in {len(unreadable)} of {replies} judgments of {group} ({total} wanted in all; max_unreadable is "
            f"{self.config.max_unreadable:g}): {listed}. {unreadable_remedy(self.config, unreadable)}"
        )

    def _progress(self, completed: int, total: int, tokens: int) -> None:
        self.context.progress(completed, total, "judgments")


def warn_if_unreachable(
    endpoint: EndpointConfig, place: str, warn: Callable[[str], None], remedy: str = JUDGED_LATE
) -> None:
    """Warn if no server listens at an endpoint's address. A judge is needed late, and may be started until then.

    Raises ``UserError`` when the endpoint's key is not in the environment.
    """
    import httpx

    from align.inference.endpoint_client import Endpoint

    Endpoint(endpoint, place=place)
    try:
        httpx.get(f"{endpoint.url}/models", timeout=3, trust_env=endpoint.url.startswith("https:"))
    except httpx.HTTPError as error:
        warn(f"{place}: nothing answers at {endpoint.url} yet ({type(error).__name__}). {remedy}")
