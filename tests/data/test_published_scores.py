"""The rules of published results, each against answers that its source would accept and refuse."""

from __future__ import annotations

import pytest

from align.data.published_scores import countdown, gsm8k_strict, reverse_text
from tests.support.refusals import Refused

ROW = {"id": "1", "source": "g", "checks": '{"answer": "1,200"}'}
NUMBERS = {"id": "1", "nums": [3, 8, 3, 8], "target": 24}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("so #### 1,200", 1.0),
        ("#### 1200 and then #### 7", 1.0),  # the first one counts
        ("#### 7, no: #### 1200", 0.0),
        ("####1200", 0.0),  # exactly one space
        ("####  1200", 0.0),
        ("#### 1200.", 0.0),  # texts are compared
        ("#### 1200.0", 0.0),
        ("#### $1200", 0.0),
        ("\\boxed{1200}", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_strict_follows_the_rule_in_force(response: str, score: float) -> None:
    assert gsm8k_strict([ROW], [response]) == [score]


def test_gsm8k_strict_reads_negative_answers_and_needs_one(refused: Refused) -> None:
    assert gsm8k_strict([ROW | {"checks": '{"answer": "-5"}'}], ["#### -5"]) == [1.0]
    refused(gsm8k_strict, [ROW | {"checks": ""}], ["#### 1"])


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>hm</think> <answer> 8 / (3 - 8 / 3) </answer>", 1.0),
        ("<answer>1</answer> no: <answer>8/(3-8/3)</answer>", 1.0),  # the last one counts
        ("<answer>8/(3-8/3)</answer> or <answer>1</answer>", 0.1),
        ("<answer>8 * 3</answer>", 0.1),  # not every number
        ("<answer>8 + 8 + 3 + 3</answer>", 0.1),  # 22
        ("<answer>8 ** 3 - 8 * 3</answer>", 0.1),
        ("<answer>8 / (3 - 3) + 8</answer>", 0.1),
        ("<answer>8 + 8 + 3 + 3 + 2</answer>", 0.1),
        ("<answer>__import__('os') or 8 + 8 + 3 + 3</answer>", 0.1),
        ("<answer>" + "(" * 5000 + "8/(3-8/3)" + ")" * 5000 + "</answer>", 0.1),
        ("<answer>" + "9" * 5000 + "</answer>", 0.1),
        ("8 / (3 - 8 / 3)", 0.0),
    ],
)
def test_countdown_scores_answers_in_three_steps(response: str, score: float) -> None:
    assert countdown(NUMBERS, response) == score


def test_countdown_refuses_numbers_in_other_notations() -> None:
    row = {"id": "1", "nums": [1, 2], "target": 100}
    assert countdown(row, "<answer>1e2</answer>") == 0.1


def test_countdown_needs_the_numbers_of_the_row(refused: Refused) -> None:
    refused(countdown, {"id": "1"}, "")


def test_reverse_text_is_the_ratio_of_the_first_match() -> None:
    row = {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "abcd"}]}
    assert reverse_text(row, "<reversed_text> dcba\n</reversed_text> <reversed_text>x</reversed_text>") == 1.0
    assert reverse_text(row, "<reversed_text>dc</reversed_text>") == pytest.approx(2 * 2 / 6)
    assert reverse_text(row, "dcba") == 0.0
