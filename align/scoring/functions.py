"""Functions as scorers: their calls with retries and time limits, and the reading of what they return. Torch-free.

``gold`` is short for ``align.data.checkers:gold``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.scores import FUNCTION_SECONDS, NAME_RULE, is_metric_name
from align.config.user_functions import check_call, full_path, load_function
from align.config.validation import plain_value
from align.config.verifiers import FAILED
from align.data.event_loop import await_within, call_within, gather_bounded, wait_for
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import Row
from align.errors import NO_SPACE, StageFailed, UserError, shorten
from align.scoring.scored import Kind, Scored, Scorer, StepScore, WrongSteps, read_steps
from align.store.retry import is_unreachable

LOG = logging.getLogger(__name__)

ScoreFunction = Callable[..., Any]
"""``(rows, responses) -> scores``, or ``(row, response) -> score``, sync or async, with further keyword arguments."""
SCORE = "score"
"""Key of the score in the mapping that a function may return; the others are metrics."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first retry, doubled each time, and their limit."""
STEPS = "steps"
"""Metric of a function with ``steps``: the number of steps that it scored."""


class ScoreFailed(StageFailed):
    """A function that scores has raised an exception; the message names the reward, the line and the row."""


@dataclass
class FunctionScorer(Scorer):
    """A function as a scorer. It judges a truncated response by its text, like any other.

    A function whose first parameter is called ``row`` is called for one response at a time, any other with lists.
    """

    path: str
    function: ScoreFunction
    arguments: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    """Calls under way at once of an async function that takes one response."""
    label: str = ""
    """Name of the reward in errors; without one, exceptions of the function pass through."""
    retries: int = 0
    """Further calls for a response whose call raised an exception."""
    on_error: float | None = None
    """Score of a response whose calls all failed; None to end the stage."""
    separator: str | None = None
    """Text between two steps of a response, if the function scores steps."""
    timeout: float | None = FUNCTION_SECONDS
    """Seconds that a call may need; None for no limit."""

    @property
    def waits(self) -> bool:
        """True for an async function, whose time is mostly spent waiting."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004  # an object with an async __call__
        )

    @property
    def kind(self) -> Kind:
        """The scorer's kind."""
        return "function"

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the scores, the function's further metrics, and the scores of steps if it scores steps.

        Raises ``UserError`` for a wrong number of results, for scores that are not finite and metrics that are no
        numbers, and ``ScoreFailed`` for an exception of a function with a label.
        """
        # Texts of rows, such as reference answers, were not sampled and are split here.
        answers: list[str] = [text if isinstance(text, AnswerText) else split_thought(text) for text in responses]
        results = self._call_each(rows, answers) if self.takes_one else self._call(list(rows), answers)
        if len(results) != len(responses):
            raise UserError(f"{self.path} returned {len(results)} scores for {len(responses)} responses; one each.")
        scored = Scored([], steps=None if self.separator is None else [])
        for index, (row, result) in enumerate(zip(rows, results, strict=True)):
            if scored.steps is not None:
                scored.steps.append(self._read_steps(row, answers[index], result))
                result = _with_sum(result, scored.steps[-1])
            score, values = self._read(row, result)
            scored.total.append(score)
            for name, value in values.items():
                scored.metrics.setdefault(name, [math.nan] * len(responses))[index] = value
        return scored

    @property
    def takes_one(self) -> bool:
        """True for a function that is called for one response at a time."""
        try:
            parameters = list(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):
            return False  # written in C, without a signature
        return parameters[:1] == ["row"]

    def _call(self, rows: list[Row], responses: list[str]) -> list[Any]:
        with self._naming(f"a batch of {len(rows)} rows"):
            results = call_within(self.timeout, self.function, rows, responses, **self.arguments)
            if inspect.isawaitable(results):
                results = wait_for(await_within(self.timeout, results), self.timeout)
            return list(results)

    def _call_each(self, rows: Sequence[Row], responses: list[str]) -> list[Any]:
        ended = itertools.count(1)

        def count(result: Any) -> Any:
            if self.report is not None:
                self.report(next(ended), len(responses))
            return result

        if not self.waits:
            return [count(self._try(row, response)) for row, response in zip(rows, responses, strict=True)]

        # Calls are passed unstarted, since the event loop starts one only when a slot is free.
        def call(row: Row, response: str) -> Callable[[], Awaitable[Any]]:
            async def counted() -> Any:
                return count(await self._try_async(row, response))

            return counted

        calls = [call(row, response) for row, response in zip(rows, responses, strict=True)]
        with self._naming(f"a batch of {len(rows)} rows"):
            return list(wait_for(gather_bounded(calls, self.concurrency), self.timeout))

    def _try(self, row: Row, response: str) -> Any:
        """Call the function for one response, again after an exception as long as retries are left."""
        for attempt in range(self.retries + 1):
            try:
                with self._naming(f"row {row['id']}"):
                    return self._counted(call_within(self.timeout, self.function, row, response, **self.arguments))
            except ScoreFailed as error:
                if attempt == self.retries:
                    return self._fallback(error)
            time.sleep(_pause(attempt))
        raise AssertionError

    async def _try_async(self, row: Row, response: str) -> Any:
        """Do the same as ``_try`` with an async function."""
        for attempt in range(self.retries + 1):
            try:
                with self._naming(f"row {row['id']}"):
                    result = self.function(row, response, **self.arguments)
                    return self._counted(await await_within(self.timeout, result))
            except ScoreFailed as error:
                if attempt == self.retries:
                    return self._fallback(error)
            await asyncio.sleep(_pause(attempt))
        raise AssertionError

    def _counted(self, result: Any) -> Any:
        """Return the result of a call that did not fail, with the metric ``failed`` if failures are counted."""
        if self.on_error is None:
            return result
        return {FAILED: 0.0, **(result if isinstance(result, Mapping) else {SCORE: result})}

    def _fallback(self, error: ScoreFailed) -> Any:
        """Return the result of a response whose calls all failed. Raises ``error`` if the stage is to end."""
        if self.on_error is None:
            raise error
        LOG.warning("%s; scored %g (on_error)", error, self.on_error)
        return {SCORE: self.on_error, FAILED: 1.0}

    @contextlib.contextmanager
    def _naming(self, subject: str) -> Iterator[None]:
        """Turn an exception of the function into ``ScoreFailed``; ``subject`` says what it was called for."""
        try:
            yield
        except (UserError, StageFailed, MemoryError):
            raise
        except Exception as error:
            is_disk = isinstance(error, OSError) and error.errno in NO_SPACE
            # The runner retries a stage that lost the store, and explains a full disk.
            if not self.label or is_disk or is_unreachable(error):
                raise
            detail = f"{type(error).__name__}: {str(error) or 'no message'}"
            place = self._line(error)
            raise ScoreFailed(f"rewards '{self.label}'{place}: {detail.rstrip('.')}, for {subject}") from error

    def _line(self, error: BaseException) -> str:
        """Return the last line of the function's own file that the exception passed, in brackets."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        frames_of_function = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        frame = (frames_of_function or frames)[-1]
        return f" ({Path(frame.filename).name}:{frame.lineno})"

    def _read_steps(self, row: Row, answer: str, result: Any) -> list[StepScore]:
        """Return the scores of the steps in a function's result; none if it scores the response as a whole."""
        value = plain_value(result[SCORE] if isinstance(result, Mapping) and SCORE in result else result)
        if not isinstance(value, list):
            return []
        assert self.separator is not None
        try:
            return read_steps(answer, self.separator, value)
        except WrongSteps as error:
            raise UserError(
                f"{self.path} returned {error}, for row {row['id']}. With `steps` a function returns a list with a "
                "number for each step, or with pairs of a step's text and a number; steps are separated by "
                f"{self.separator!r}."
            ) from None

    def _read(self, row: Row, result: Any) -> tuple[float, dict[str, float]]:
        """Return the score and the metrics of a function's result: a number, or a mapping with ``score``."""
        if not isinstance(result, Mapping):
            return self._finite(row, result, ""), {}
        if SCORE not in result:
            keys = ", ".join(shorten(str(key)) for key in result) or "nothing"
            raise UserError(f"{self.path} returned {{{keys}}} for row {row['id']}; a mapping needs the key 'score'.")
        metrics = {}
        for name, value in result.items():
            if name == SCORE:
                continue
            if not is_metric_name(name):
                raise UserError(
                    f"{self.path} returned a metric called {shorten(repr(name))} for row {row['id']}; {NAME_RULE}."
                )
            metrics[name] = self._finite(row, value, f" as '{name}'")
        return self._finite(row, result[SCORE], " as 'score'"), metrics

    def _finite(self, row: Row, value: Any, key: str) -> float:
        value = plain_value(value)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"{self.path} returned {shorten(repr(value))}{key} for row {row['id']}; it must return finite numbers."
            )
        return float(value)


def _with_sum(result: Any, steps: list[StepScore]) -> Any:
    """Return a function's result with the number of its steps, and with their sum if it is a list of scores."""
    fields = dict(result) if isinstance(result, Mapping) else {SCORE: result}
    if isinstance(plain_value(fields.get(SCORE)), list):
        fields[SCORE] = math.fsum(step.score for step in steps)
    return {STEPS: float(len(steps)), **fields}


def _pause(attempt: int) -> float:
    """Return the seconds to wait after an attempt, counted from 0."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt)


def function_scorer(
    path: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    concurrency: int = 16,
    place: str = "score",
    label: str = "",
    retries: int = 0,
    on_error: float | None = None,
    steps: str | None = None,
    timeout: float | None = FUNCTION_SECONDS,
) -> FunctionScorer:
    """Return the scorer behind ``module:name`` or a short name, with keyword ``arguments`` of the function.

    Raises ``UserError``, which begins with ``place``, when it cannot be imported or does not take the arguments.
    """
    function = load_function(path, place)
    full = full_path(path, place)
    check_call(function, arguments or {}, full.rpartition(":")[2], place)
    scorer = FunctionScorer(full, function, arguments or {}, concurrency, label, retries, on_error, steps, timeout)
    if (retries or on_error is not None) and not scorer.takes_one:
        raise UserError(
            f"{place}: retries and on_error are for a function of one response, and the first parameter of {full} is "
            "not `row`. Take `(row, response)`, or catch the exceptions in the function."
        )
    return scorer
