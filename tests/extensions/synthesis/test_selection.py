"""Which answers become rows: all of them, the best, pairs by score and by judge; with counts that add up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from align.data.rows import Message, Row, user
from align.extensions.synthesis.config import BestOfTask, PairsTask, ResponsesTask
from align.extensions.synthesis.pairing import Judge, pair_by_judge, pair_by_score
from align.extensions.synthesis.selection import Ledger, select_all, select_best, split_by_prompt
from align.inference.requests import Answer
from align.scoring.functions import FunctionScorer
from align.scoring.scored import Scored, Scorer
from align.stages.prompt_responses import PromptResponses, score_all

CUT = Answer("cut", finished=False)
EMPTY, REFUSED, FAILED = Answer(" "), Answer("no", refused=True), Answer("", error="status 400")


def _row(name: str = "r") -> Row:
    return {"id": name, "source": "s", "prompt": [user(f"Q {name}")], "checks": "", "completion": None, "score": 3.0}


def _one(*answers: Answer | str, name: str = "r") -> PromptResponses:
    return PromptResponses(_row(name), [Answer(answer) if isinstance(answer, str) else answer for answer in answers])


def _scored(*scored: tuple[Answer | str, float], name: str = "r") -> PromptResponses:
    answers = _one(*(answer for answer, _ in scored), name=name)
    values = iter([score for _, score in scored])
    score_all([answers], FunctionScorer("values", lambda rows, texts: [next(values) for _ in texts]))
    return answers


def _texts(rows: list[Row]) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def test_every_different_answer_becomes_a_row() -> None:
    ledger = Ledger()
    answered = [_one("a", "b", "a ", CUT, EMPTY, REFUSED, FAILED), _one(EMPTY, name="q")]
    rows = select_all(ResponsesTask(type="responses", n=7), answered, ledger)
    assert rows == [
        {"id": f"r-{index}", "source": "s", "prompt": [user("Q r")], "checks": "",
         "completion": [{"role": "assistant", "content": text}], "completion_finished": True}
        for index, text in ((0, "a"), (1, "b"))
    ]  # fmt: skip
    actual = ledger.to_json()
    assert actual["answers"]["dropped"] == {
        "cut off at max_tokens": 1, "empty answer": 2, "refused by the endpoint": 1, "request failed": 1,
        "same as another answer": 1,
    }  # fmt: skip
    assert (actual["answers"]["in"], actual["answers"]["out"]) == (8, 2)
    assert actual["prompts"] | {"examples": 0} == {"in": 2, "out": 1, "dropped": {"no answer of use": 1}, "examples": 0}


def test_one_answer_keeps_the_id_of_its_row() -> None:
    rows = select_all(ResponsesTask(type="responses", cut_off="keep"), [_one(CUT)], Ledger())
    assert [(row["id"], row["completion"][0]["content"]) for row in rows] == [("r", "cut")]
    assert rows[0]["completion_finished"] is False
    (best,) = select_best(BestOfTask(type="best_of", n=2, cut_off="keep"), [_scored((CUT, 9), ("b", 3))], Ledger())
    assert (best["completion"][0]["content"], best["completion_finished"]) == ("cut", False)


@pytest.mark.parametrize(
    ("scored", "settings", "remaining", "dropped"),
    [
        ([("a", 1), ("b", 3), ("c", 2)], {}, ["b"], {"not among the best": 2}),
        ([("a", 1), ("b", 3), ("c", 3)], {}, ["b"], {"not among the best": 2}),
        ([("a", 1), ("b", 3), ("c", 2)], {"keep": 2}, ["b", "c"], {"not among the best": 1}),
        ([("a", 1), ("b", 3), ("b ", 3)], {"keep": 2}, ["b", "a"], {"same as another answer": 1}),
        ([("a", 1), ("b", 3), ("c", 2)], {"keep": 2, "min_score": 3}, ["b"], {"score below min_score": 2}),
        ([("a", 1), ("b", 3)], {"min_score": 3.5}, [], {"score below min_score": 2}),
        ([("a", 1), ("a ", 1)], {}, [], {"all answers the same": 2}),
        ([("a", 1), (EMPTY, 0)], {}, ["a"], {"empty answer": 1}),
        ([(CUT, 9), ("b", 3)], {}, ["b"], {"cut off at max_tokens": 1}),
        ([(CUT, 9), ("b", 3)], {"cut_off": "keep"}, ["cut"], {"not among the best": 1}),
        ([(EMPTY, 0), (REFUSED, 0)], {}, [], {"empty answer": 1, "refused by the endpoint": 1}),
    ],
)
def test_the_best_answers(scored: Any, settings: dict[str, Any], remaining: list[str], dropped: dict[str, int]) -> None:
    ledger = Ledger()
    rows = select_best(BestOfTask(**{"type": "best_of", "n": 3} | settings), [_scored(*scored)], ledger)
    assert _texts(rows) == remaining
    actual = ledger.to_json()
    assert actual["answers"]["dropped"] == dropped
    assert actual["prompts"]["out"] == bool(remaining)
    for row in rows:
        text = row["completion"][0]["content"]
        assert row["score"] == next(score for answer, score in scored if text in (answer, getattr(answer, "text", "")))


def test_why_a_prompt_gave_no_best_answer() -> None:
    ledger = Ledger()
    answered = [
        _scored(("a", 1), ("b", 0), name="low"),
        _scored(("a", 1), ("a", 1), name="same"),
        _scored((EMPTY, 0), name="none"),
    ]
    assert select_best(BestOfTask(type="best_of", min_score=2), answered, ledger) == []
    actual = ledger.to_json()["prompts"]
    assert actual["dropped"] == {"all answers the same": 1, "no answer of use": 1, "no score reaches min_score": 1}
    assert actual["examples"]["no score reaches min_score"] == [{"where": "low", "text": "a", "detail": {"best": 1.0}}]


def test_scores_go_to_their_answers() -> None:
    answered = [_one("a", EMPTY, "ccc"), _one(FAILED), _one(CUT)]
    are_cut: list[bool] = []

    class Length(Scorer):
        def score(
            self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
        ) -> Scored:
            are_cut.extend(truncated or [])
            return Scored([float(len(text)) for text in responses])

    score_all(answered, Length())
    assert [entry.scores for entry in answered] == [[1.0, None, 3.0], [None], [3.0]]
    assert are_cut == [False, False, True]


def _pairs(**settings: Any) -> PairsTask:
    return PairsTask(**{"type": "pairs", "n": 3} | settings)


def test_pairs_by_score_and_their_ties() -> None:
    ledger = Ledger()
    answered = [
        _scored(("a", 1), ("b", 3), (CUT, 2), name="x"),
        _scored(("a", 1), ("b", 1), name="tied"),
        _scored(("a", 1), ("b", 1.4), name="close"),
        _scored(("a", 1), ("a", 1), name="same"),
        _scored(("a", 1), (EMPTY, 0), name="few"),
    ]
    pairs = pair_by_score(_pairs(min_margin=0.5), answered, 1, ledger)
    assert [
        (pair["id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["chosen_score"])
        for pair in pairs.pairs
    ] == [("x-1-0", "b", "a", 3.0)]
    assert [(tie["id"], tie["why"], [response["score"] for response in tie["responses"]]) for tie in pairs.ties] == [
        ("tied-0-1", "equal scores", [1.0, 1.0]), ("close-1-0", "margin below min_margin", [1.4, 1.0]),
    ]  # fmt: skip
    counts = ledger.to_json()
    assert counts["comparisons"]["dropped"] == {"both answers the same": 1, "margin below min_margin": 1, "tie": 1}
    assert (counts["comparisons"]["in"], counts["comparisons"]["out"]) == (4, 1)
    assert counts["prompts"]["dropped"] == {"fewer than two answers of use": 1, "no answer better than another": 3}
    assert (counts["answers"]["in"], counts["answers"]["out"]) == (11, 10)


def test_all_pairs_by_score_keep_the_mark_of_a_cut_answer() -> None:
    pairs = pair_by_score(_pairs(pairs="all"), [_scored(("a", 1), ("b", 3), (CUT, 2))], 1, Ledger())
    assert sorted(pair["id"] for pair in pairs.pairs) == ["r-1-0", "r-1-2", "r-2-0"]
    assert {pair["id"]: (pair["chosen_finished"], pair["rejected_finished"]) for pair in pairs.pairs} == {
        "r-1-0": (True, True), "r-1-2": (True, False), "r-2-0": (False, True),
    }  # fmt: skip


def _judge(prefers: Callable[[str, str], str]) -> Callable[[list[list[Message]]], list[Answer]]:
    """A judge that says what ``prefers(first, second)`` says."""

    def ask(questions: list[list[Message]]) -> list[Answer]:
        values = []
        for (message,) in questions:
            first, _, rest = message["content"].partition("### Answer A\n")[2].partition("\n\n### Answer B\n")
            values.append(Answer(f"[[{prefers(first, rest.partition(chr(10))[0])}]]"))
        return values

    return ask


def _by_judge(
    answered: list[PromptResponses], prefers: Callable[[str, str], str], **settings: Any
) -> tuple[list[str], list[tuple[str, str]], Ledger]:
    ledger = Ledger()
    actual = pair_by_judge(_pairs(**settings), answered, Judge("rubric", _judge(prefers)), 1, ledger)
    assert all(pair["chosen_score"] == 1.0 and pair["rejected_score"] == 0.0 for pair in actual.pairs)
    pairs = [f"{pair['chosen'][0]['content']}>{pair['rejected'][0]['content']}" for pair in actual.pairs]
    return pairs, [(tie["id"], tie["why"]) for tie in actual.ties], ledger


def _longer(first: str, second: str) -> str:
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


VERDICTS = ("A", "B", "C", "?")


@pytest.mark.parametrize(("straight", "swapped"), list(itertools.product(VERDICTS, VERDICTS)))
def test_two_answers_in_both_orders(straight: str, swapped: str) -> None:
    answers = _one("left", "right")
    pairs, ties, ledger = _by_judge([answers], lambda first, _: straight if first == "left" else swapped)
    wins = {("A", "B"): "left>right", ("B", "A"): "right>left"}
    if (straight, swapped) in wins:
        assert (pairs, ties) == ([wins[straight, swapped]], [])
    elif "?" in (straight, swapped):
        assert (pairs, ties) == ([], [])
        assert ledger.to_json()["comparisons"]["dropped"] == {"verdict not readable": 1}
    else:
        why = "tie" if straight == swapped == "C" else "orders disagree"
        assert (pairs, ties) == ([], [("r-0-1", why)])
    assert answers.verdicts[0]["said"] == [f"[[{straight}]]", f"[[{swapped}]]"]


def test_best_and_worst_by_a_judge() -> None:
    pairs, ties, ledger = _by_judge([_one("aa", "a", "aaa", "aa")], _longer, n=4)
    assert (pairs, ties) == (["aaa>a"], [])
    # four answers, of which two are the same text: five comparisons in both orders
    assert sum(ledger.notes.values()) == 10
    assert ledger.notes == {"judge said first": 5, "judge said second": 5}


def test_every_pair_by_a_judge() -> None:
    pairs, ties, ledger = _by_judge([_one("aa", "a", "bb")], _longer, pairs="all")
    assert sorted(pairs) == ["aa>a", "bb>a"] and ties == [("r-0-2", "tie")]
    counts = ledger.to_json()["comparisons"]
    assert (counts["in"], counts["out"], counts["dropped"]) == (3, 2, {"tie": 1})


def test_a_judge_who_goes_round_in_circles_prefers_nothing() -> None:
    beats = {("x", "y"), ("y", "z"), ("z", "x")}
    pairs, ties, _ = _by_judge([_one("x", "y", "z")], lambda left, right: "A" if (left, right) in beats else "B")
    assert (pairs, [why for _, why in ties]) == ([], ["orders disagree"])


def test_a_judge_who_always_takes_the_first_makes_no_pair() -> None:
    pairs, ties, ledger = _by_judge([_one("x", "y"), _one("x", "y", name="q")], lambda *_: "A", n=2)
    assert pairs == [] and [why for _, why in ties] == ["orders disagree"] * 2
    assert ledger.notes == {"judge said first": 4}


def test_answers_that_are_all_the_same_are_not_judged() -> None:
    requests: list[Any] = []
    ledger = Ledger()
    pairs = pair_by_judge(_pairs(), [_one("x", "x", EMPTY)], Judge("r", lambda q: requests.extend(q) or []), 1, ledger)  # type: ignore[func-returns-value]
    assert (pairs.pairs, pairs.ties, requests) == ([], [], [])
    assert ledger.to_json()["prompts"]["dropped"] == {"no answer better than another": 1}


def test_splits_are_by_prompt_and_neither_is_empty() -> None:
    rows = [{"prompt": [user(f"question {number // 2}")], "id": number} for number in range(200)]
    actual = split_by_prompt(rows, 0.2, 1)
    assert len(actual["train"]) + len(actual["test"]) == 200 and 20 <= len(actual["test"]) <= 60
    assert not {row["prompt"][0]["content"] for row in actual["train"]} & {
        row["prompt"][0]["content"] for row in actual["test"]
    }
    for size in (0.001, 0.999):
        assert {len(part) for part in split_by_prompt(rows[:4], size, 1).values()} == {2}
    assert split_by_prompt(rows[:1], 0.5, 1)["train"] != split_by_prompt(rows[:1], 0.5, 1)["test"]


def test_a_book_that_does_not_add_up_is_a_bug() -> None:
    ledger = Ledger()
    ledger.add("prompts", 2)
    ledger.keep("prompts")
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.to_json()
