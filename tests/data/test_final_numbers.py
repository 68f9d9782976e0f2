"""The number a solution comes to: one rule, the same verdict as a reward and in an evaluation."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from align.data.checkers import gsm8k_answer
from align.data.final_numbers import boxed_number, final_number
from tests.support.evaluation.tasks.respondents import NoModelContext, answered, make_gsm8k_task

TEXTS = {
    "He has 3 cats.\n#### 1,200": "1200",
    "#### 5\nno, #### 6 and 7": "5",
    "#### 72\n\nQuestion: what is 3 + 1?\nAnswer: 4": "72",
    "#### $1,080.00 in all, 3 of them": "1080",
    "####\n9": "9",
    "5 apples\n####": "5",
    "so it costs $12.50.": "12.5",
    "-4": "-4",
    "−4": "-4",
    "10-3": "3",
    "4,5": "5",
    "18 dollars": "18",
    "18 km/h": "18",
    "18%": "18",
    "it is 18.": "18",
    "it is 18.00...": "18",
    "that is 18. $.": "18",
    "$\\boxed{72}$ is right, and not 7 or 8": "72",
    "\\boxed{\\$1{,}080}": "1080",
    "\\boxed{72 \\text{ apples}}, of 80": "72",
    "first \\boxed{3}, then \\boxed{x = 4}. 5": "4",
    "\\boxed{many} of 6": "6",
    "\\boxed{3}\n#### 4": "4",
    "\\boxed{5": "5",
    "": None,
    "nothing": None,
}


@pytest.mark.parametrize(("text", "number"), TEXTS.items())
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_reward_and_evaluation_give_every_text_the_same_verdict(tmp_path: Path) -> None:
    problems = [(text, number) for text, number in TEXTS.items() if number is not None]
    records = [
        {"question": f"Which, number {index}?", "answer": f"so\n#### {number}"}
        for index, (_, number) in enumerate(problems)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [{"id": str(index), "checks": json.dumps({"answer": number})} for index, (_, number) in enumerate(problems)]
    task = make_gsm8k_task(tmp_path, files=["asked.jsonl"])
    for shift in (0, 1):  # the right answers, and others'
        texts = [problems[(index + shift) % len(problems)][0] for index in range(len(problems))]
        scores = gsm8k_answer(rows, texts)
        measured = task.score({"a": answered(task, [[text] for text in texts])}, NoModelContext())["a"]
        assert [samples[0] for samples in measured.values[task.primary]] == scores
        assert sum(scores) == len(scores) if shift == 0 else sum(scores) < len(scores) / 2


def test_boxes_are_read_in_no_time() -> None:
    started = time.perf_counter()
    for piece in ("\\boxed{", "\\boxed{1}", "\\boxed {a{", "{}", "\\boxed{{1}"):
        boxed_number(piece * 20_000)
    assert time.perf_counter() - started < 5
