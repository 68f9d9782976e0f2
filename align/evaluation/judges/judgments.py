"""Asks an endpoint that judges: from a cache where it can, and never past a judge that cannot be used.

Every judgment is kept the moment it is there, so that a killed evaluation asks only what is left. A judge that is not
reached, or whose verdicts cannot be read, ends the evaluation with counts. Left out: what is asked (``judge.py``,
``grading.py``), and what verdicts come to (``contests.py``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, model_validator

from align.config.base import Config
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.tasks.base import Bench
from align.inference.cached_client import Asker, Prices
from align.inference.endpoint import EndpointConfig
from align.inference.requests import Answer, Request, RequestCache

FOLDER = "judgments"
PROBE = 16
"""Judgments asked before the rest: where half of them cannot be read, the rest is not paid for."""
SHOWN = 200
"""Characters of a verdict in an error."""
PROGRESS_SECONDS = 0.2


class EndpointJudge(Config):
    """How an endpoint is asked to judge."""

    endpoint: EndpointConfig | None = None
    """The server that judges; a local vLLM server is one."""
    rubric: str | None = Field(None, pattern=r"\S")
    """What makes an answer good, in place of the usual words; part of every question."""
    max_tokens: int = Field(512, ge=1)
    """Longest verdict; one that is cut off before its last line cannot be read, and is counted."""
    temperature: float = Field(0.0, ge=0, le=5)
    """0 asks for the likeliest verdict."""
    seed: int = Field(0, ge=0)
    """Another one asks everything anew: for a second opinion at a temperature above 0, or of a mended server."""
    max_unreadable: float = Field(0.1, ge=0, lt=1)
    """Share of the judgments of any system or pair that may be unreadable; they are counted and left out. More is an
    error."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoint costs more in all, by its prices; raise it and run again to go on."""

    @model_validator(mode="after")
    def _prices_for_the_budget(self) -> EndpointJudge:
        if self.max_cost is not None and (self.endpoint is None or self.endpoint.price_input is None):
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output")
        return self

    def identity(self) -> dict[str, Any]:
        """What verdicts depend on."""
        asked = self.model_dump(include={"rubric", "max_tokens", "temperature", "seed"})
        return asked | (self.endpoint.identity() if self.endpoint is not None else {})


class Judgments:
    """One task's judgments by one endpoint."""

    def __init__(self, config: EndpointJudge, task: str, bench: Bench) -> None:
        """Raises ``UserError`` when the endpoint's key is not in the environment."""
        from align.inference.endpoint_client import Endpoint

        assert config.endpoint is not None
        self.config, self.task, self.bench = config, task, bench
        self.at = config.endpoint
        # A request that the server refuses as such (a filter, a length) is one judgment that is not there.
        self.endpoint = Endpoint(config.endpoint, drop=True, place=f"tasks.{task}.judge.endpoint")
        cache = RequestCache(bench.folder / FOLDER)
        shared = None if bench.shared is None else RequestCache(bench.shared / FOLDER)
        for one in (cache, shared):
            if one is not None and one.unreadable:
                bench.warn(
                    f"{one.unreadable} lines in {one.folder} are not what was written there; their judgments are "
                    "asked again"
                )
        prices = {}
        if config.endpoint.price_input is not None and config.endpoint.price_output is not None:
            prices["judge"] = Prices(config.endpoint.price_input, config.endpoint.price_output)
        self.asker = Asker(cache, shared, config.max_cost, prices, self._progress)
        self._told = 0.0

    def ask(
        self, questions: Sequence[list[Message]], groups: Sequence[str], readable: Callable[[str], bool]
    ) -> list[Answer]:
        """The judge's answers; ``groups`` names the system or pair of each question.

        Raises ``UserError`` where more than ``max_unreadable`` of the judgments of any group cannot be read, at once
        where that is so of half of the first few; an endpoint that fails raises as ``Endpoint`` does, with counts.
        """
        requests = [self._request(question) for question in questions]
        self.asker.expected = len(requests)
        answers = self._answers(requests, requests[:PROBE])
        bad = [at for at, answer in enumerate(answers) if not readable(answer.text)]
        if len(answers) < len(requests) and 2 * len(bad) >= len(answers):
            raise self._garbled("its first questions", [answers[at] for at in bad], len(answers), len(requests))
        answers += self._answers(requests, requests[PROBE:])
        self.bench.progress(len(requests), len(requests), "judgments")
        for group in dict.fromkeys(groups):
            own = [answer for answer, its in zip(answers, groups, strict=True) if its == group]
            bad_ones = [answer for answer in own if not readable(answer.text)]
            if len(bad_ones) > self.config.max_unreadable * len(own):
                raise self._garbled(group, bad_ones, len(own), len(requests))
        return answers

    def usage(self) -> dict[str, Any]:
        """Requests, tokens and cost so far; what the shared cache had is apart."""
        return dict(self.asker.usage_json().get("judge", {}))

    def _request(self, messages: list[Message]) -> Request:
        return Request(
            model=self.endpoint.identity,
            messages=messages,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed,
        )

    def _answers(self, all_of_them: Sequence[Request], wanted: Sequence[Request]) -> list[Answer]:
        from align.inference.endpoint_client import EndpointLost

        try:
            return self.asker.ask(self.endpoint, wanted, "judge")
        except (EndpointLost, UserError) as error:
            there = sum(request.key in self.asker.cache for request in all_of_them)
            counts = f"{there} of {len(all_of_them)} judgments of task '{self.task}' are there and kept."
            raise type(error)(f"{error} {counts}") from None

    def _garbled(self, of: str, bad: Sequence[Answer], asked: int, wanted: int) -> UserError:
        """The error for verdicts that cannot be read: how many, why, one of them, and what to do."""
        reasons = {
            "refused by the server": sum(bool(one.error) for one in bad),
            "cut off at judge.max_tokens": sum(not one.finished and not one.error for one in bad),
            "declined by the judge": sum(one.refused and one.finished for one in bad),
        }
        reasons["without a verdict in the form asked for"] = len(bad) - sum(reasons.values())
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        example = next((one for one in bad if one.text.strip()), bad[0])
        said = example.error or example.text
        quoted = json.dumps(said[:SHOWN]) + (" …" if len(said) > SHOWN else "")  # ASCII: nothing in it can act
        return UserError(
            f"tasks.{self.task}: the judge {self.at.model} at {self.at.url} gave no readable verdict in {len(bad)} of "
            f"{asked} judgments of {of} ({wanted} wanted in all; max_unreadable is {self.config.max_unreadable:g}): "
            f"{why}. It said, for example: {quoted}. Take a judge that can answer in the form asked for, raise "
            "judge.max_tokens where verdicts are cut off, or raise judge.max_unreadable. Answers are kept: a server "
            f"that was mended is asked anew with judge.seed: {self.config.seed + 1}."
        )

    def _progress(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told < PROGRESS_SECONDS:
            return  # each report is a line in a file
        self._told = now
        self.bench.progress(done, total, "judgments")


def look_for(endpoint: EndpointConfig, place: str, warn: Callable[[str], None]) -> None:
    """Warn when nothing listens where the judge should be: it is needed late, and may be started until then.

    Raises ``UserError`` when the endpoint's key is not in the environment.
    """
    import httpx

    from align.inference.endpoint_client import Endpoint

    Endpoint(endpoint, place=place)
    try:
        httpx.get(f"{endpoint.url}/models", timeout=3, trust_env=endpoint.url.startswith("https:"))
    except httpx.HTTPError as error:
        warn(
            f"{place}: nothing answers at {endpoint.url} yet ({type(error).__name__}). The judge is asked once every "
            "system has answered; start it until then."
        )
