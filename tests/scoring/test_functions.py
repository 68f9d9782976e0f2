"""Verifiable functions by import path."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config.user_functions import function_identity
from align.config.validation import plain_value
from align.data import checkers
from align.data.families.embedded import generate
from align.data.final_answers import AnswerText
from align.scoring.functions import FunctionScorer, function_scorer
from tests.support import rewards
from tests.support.refusals import Refused

ROWS: list[dict[str, Any]] = [{"id": str(index), "checks": ""} for index in range(3)]


def test_gold_by_short_and_long_name() -> None:
    rows = generate(3, 0)
    replies = [row["completion"][0]["content"] for row in rows]
    assert function_scorer("gold").score(rows, replies).total == [1.0, 1.0, 1.0]
    assert function_scorer("align.data.checkers:gold").score(rows, ["", "", ""], [True] * 3).total == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "path",
    [
        "golden",
        "align.data.chekers:gold",
        "align.data.checkers:gsm8k_anser",
        "no_such_package_here.x:y",
    ],
)
def test_bad_paths(refused: Refused, path: str) -> None:
    refused(function_scorer, path)


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])[0]])
def test_numbers_of_numpy_and_torch_are_scores(refused: Refused, number: Any) -> None:
    plain = FunctionScorer("f", lambda rows, responses: [{"score": number, "share": number}])
    scored = plain.score(ROWS[:1], [""])
    assert (scored.total, scored.metrics) == ([0.5], {"share": [0.5]})
    refused(lambda: FunctionScorer("f", lambda rows, responses: [np.array([1.0, 2.0])]).score(ROWS[:1], [""]))


def test_tensors_in_records_become_plain_values() -> None:
    record = {"score": np.float32(0.5), "ids": np.arange(2), "inner": [{"x": torch.tensor([1, 2])}], "text": "a"}
    assert plain_value(record) == {"score": 0.5, "ids": [0, 1], "inner": [{"x": [1, 2]}], "text": "a"}


def test_a_users_function(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores.py").write_text(
        "def length(rows, responses): return [len(r) for r in responses]\n"
        "def short(rows, responses): return []\n"
        "def nan(rows, responses): return [float('nan')]\n"
    )
    row = {"id": "7", "checks": ""}
    assert function_scorer("my_scores:length").score([row], ["abc"]).total == [3.0]
    refused(lambda: function_scorer("my_scores:short").score([row], ["abc"]))
    refused(lambda: function_scorer("my_scores:nan").score([row], ["abc"]))
    before = function_identity("my_scores:length")
    (tmp_path / "my_scores.py").write_text("def length(rows, responses): return [1.0]\n")
    assert function_identity("my_scores:length") != before
    assert function_identity("gold") == f"align.data.checkers:gold version {checkers.VERSION}"


def test_arguments_reach_the_function(refused: Refused) -> None:
    scorer = function_scorer("tests.support.rewards:length", {"limit": 2})
    assert scorer.score(ROWS[:2], ["a", "bcd"]).total == [0.5, 1.5]
    refused(function_scorer, "tests.support.rewards:length", {"limt": 2}, place="score[1]")


def test_function_of_one_response_may_skip_metrics() -> None:
    scored = function_scorer("tests.support.rewards:vowels").score(ROWS[:2], ["ax", "xyz"])
    (vowels, missing) = scored.metrics.pop("vowels")
    assert vowels == 1.0 and math.isnan(missing)
    assert (scored.total, scored.metrics) == ([0.5, 0.0], {"characters": [2.0, 3.0]})


def test_format_reward_reads_thought_and_answer() -> None:
    def well_formed(row: Any, response: Any) -> float:
        """As in docs/thinking.md."""
        return float(bool(response.thought) and not response.is_open and bool(response))

    texts = ["<think>a</think>yes", "<think>a</think>", "<think>a", "yes"]
    scorer = FunctionScorer("mine:well_formed", well_formed)
    assert scorer.score([{"id": "r"}] * 4, texts).total == [1.0, 0.0, 0.0, 0.0]
    # A sampled response may begin inside a thought, which its text does not show.
    assert scorer.score([{"id": "r"}], [AnswerText.cut("a yes", 2)]).total == [1.0]


def test_async_calls_are_bounded_and_stay_in_order() -> None:
    rewards.WATCH["most"] = 0
    responses = ["a" * number for number in range(30)]
    rows = [{"id": str(number), "checks": ""} for number in range(30)]
    scorer = function_scorer("tests.support.rewards:watched", concurrency=5)
    assert scorer.waits
    assert scorer.score(rows, responses).total == [float(number) for number in range(30)]
    assert rewards.WATCH["most"] == 5
    assert function_scorer("tests.support.rewards:batched").score(ROWS, ["a", "b", "c"]).total == [1.0] * 3


@pytest.mark.parametrize("function", ["vowels", "watched"])
def test_responses_are_counted_while_a_function_scores(function: str) -> None:
    counts: list[tuple[int, int]] = []
    scorer = function_scorer(f"tests.support.rewards:{function}")
    scorer.report = lambda *count: counts.append(count)
    rows = [{"id": str(number), "checks": ""} for number in range(3)]
    assert len(scorer.score(rows, ["a", "b", "c"]).total) == 3
    assert counts == [(1, 3), (2, 3), (3, 3)]


def test_every_batch_runs_in_the_same_loop() -> None:
    """A client that a function opens once belongs to a loop."""
    import asyncio

    loops = []

    async def remember(row: dict[str, Any], response: str) -> float:
        loops.append(asyncio.get_running_loop())
        return 0.0

    scorer = FunctionScorer("remember", remember)
    scorer.score(ROWS, ["a"] * 3)
    scorer.score(ROWS, ["b"] * 3)
    assert len(loops) == 6 and len(set(loops)) == 1


def test_an_exception_passes_through_at_once(refused: Refused) -> None:
    started = time.monotonic()
    refused(lambda: function_scorer("tests.support.rewards:failing").score(ROWS, ["good", "bad", "good"]))
    assert time.monotonic() - started < 10  # the others would take a minute


def test_exception_names_reward_line_and_row(refused: Refused) -> None:
    inspect.getsourcelines(rewards.failing)[1] + 2
    scorer = function_scorer("tests.support.rewards:failing", label="judge")
    refused(scorer.score, ROWS, ["good", "bad", "good"])

    def silent(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
        raise TimeoutError

    refused(lambda: FunctionScorer("silent", silent, label="silent").score(ROWS, ["a"] * 3))


@pytest.mark.parametrize("is_async", [False, True])
def test_retries_and_on_error(refused: Refused, is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.scoring.functions.FIRST_WAIT", 0.01)
    calls: Counter[str] = Counter()

    def fail_often(row: dict[str, Any], response: str) -> float:
        calls[response] += 1
        if response == "never" or calls[response] < 3:
            raise ConnectionError("busy")
        return 1.0

    async def wait_and_fail(row: dict[str, Any], response: str) -> float:
        return fail_often(row, response)

    function = wait_and_fail if is_async else fail_often
    scorer = FunctionScorer("f", function, label="f", retries=2, on_error=-1.0)
    scored = scorer.score(ROWS[:2], ["late", "never"])
    assert (scored.total, scored.metrics) == ([1.0, -1.0], {"failed": [0.0, 1.0]})
    assert calls == {"late": 3, "never": 3}
    refused(lambda: FunctionScorer("f", function, label="f", retries=2).score(ROWS[:2], ["late", "never"]))


def hang(row: dict[str, Any], response: str) -> float:
    while response == "never":
        # As retry loops of users do.
        with contextlib.suppress(Exception):
            time.sleep(60)
    return 1.0


async def hang_async(row: dict[str, Any], response: str) -> float:
    await asyncio.sleep(60 if response == "never" else 0)
    return 1.0


def hang_on_pattern(row: dict[str, Any], response: str) -> float:
    return float(response != "never" or bool(re.match("(a+)+b", "a" * 40)))


@pytest.mark.parametrize("function", [hang, hang_async, hang_on_pattern])
def test_call_that_hangs_fails_within_its_timeout(refused: Refused, function: Any) -> None:
    began = time.monotonic()
    scorer = FunctionScorer("f", function, label="f", on_error=-1.0, timeout=0.5)
    scored = scorer.score(ROWS[:2], ["never", "x"])
    assert (scored.total, scored.metrics) == ([-1.0, 1.0], {"failed": [1.0, 0.0]})
    refused(lambda: FunctionScorer("f", function, label="f", timeout=0.5).score(ROWS[:1], ["never"]))
    assert time.monotonic() - began < 10


def test_hanging_batch_and_blocked_loop_end_in_time(refused: Refused) -> None:
    def hang_with_rows(rows: list[Any], responses: list[str]) -> list[float]:
        time.sleep(60)
        return []

    began = time.monotonic()
    refused(lambda: FunctionScorer("f", hang_with_rows, label="f", timeout=0.2).score(ROWS[:2], ["a", "b"]))

    async def block(row: dict[str, Any], response: str) -> float:
        time.sleep(3)  # instead of await: no other call can run
        return 0.0

    refused(lambda: FunctionScorer("f", block, label="f", timeout=0.2).score(ROWS[:2], ["a", "b"]))
    assert time.monotonic() - began < 5
    time.sleep(max(0.0, 3.5 - (time.monotonic() - began)))  # other tests use the loop


def test_timeout_holds_in_threads_without_signals(refused: Refused) -> None:
    with ThreadPoolExecutor(1) as pool:
        scorer = FunctionScorer("f", hang_on_pause, label="f", timeout=0.3)
        refused(lambda: pool.submit(scorer.score, ROWS[:1], ["never"]).result())


def hang_on_pause(row: dict[str, Any], response: str) -> float:
    time.sleep(5)
    return 0.0


def test_timeout_of_the_function_itself_is_its_own(refused: Refused) -> None:
    async def give_up(row: dict[str, Any], response: str) -> float:
        raise TimeoutError("the service")

    refused(lambda: FunctionScorer("f", give_up, label="f", timeout=5).score(ROWS[:1], ["a"]))


def test_sum_of_steps_is_of_the_same_response(refused: Refused) -> None:
    def steps(rows: list[dict[str, Any]], responses: list[str]) -> list[Any]:
        return [[1.0, 2.0], [10.0], {"score": [4.0, 8.0, 16.0], "depth": 5.0}]

    scored = FunctionScorer("f", steps, separator="|").score(ROWS, ["a|b", "c", "d|e|f"])
    # 1 + 2; 10; 4 + 8 + 16
    assert scored.total == [3.0, 10.0, 28.0]
    assert scored.metrics["steps"] == [2.0, 1.0, 3.0]
    assert math.isnan(scored.metrics["depth"][0]) and scored.metrics["depth"][2] == 5.0
    # Without a separator a list is no score.
    refused(lambda: FunctionScorer("f", steps).score(ROWS, ["a|b", "c", "d|e|f"]))


def test_retries_need_a_function_of_one_response(refused: Refused) -> None:
    refused(function_scorer, "tests.support.rewards:length", retries=1, place="score[0]")


@pytest.mark.parametrize(
    "result",
    [
        {"reward": 1.0},
        {"score": float("nan")},
        {"score": None},
        {"score": 1.0, "tokens": "12"},
        {"score": 1.0, "std": 1.0},
        {"score": 1.0, "length_correlation": 1.0},
        {"score": 1.0, "a b": 1.0},
        None,
        float("inf"),
    ],
)
def test_a_wrong_result_names_the_row(refused: Refused, result: Any) -> None:
    refused(lambda: FunctionScorer("f", lambda rows, responses: [result]).score(ROWS[:1], ["a"]))
