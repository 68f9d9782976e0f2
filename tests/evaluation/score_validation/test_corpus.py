"""A corpus of rewards: 20 with mistakes that people make, of which most are refused, and 10 correct rewards."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence

import pytest

from align.config.scores import ScoreValidation
from align.data.rows import Row, assistant, user
from align.errors import UserError
from align.evaluation.score_validation.validation import refuse_problems, validate_parts
from align.scoring.functions import FunctionScorer
from align.scoring.score import Part

Rule = Callable[[Row, str], float]
NUMBERS = (7, 12, 1080, 33, 24500, 48, 91, 3200, 5, 260, 1975, 14, 640, 87, 2021, 402)
CITIES = ("Paris", "Rome", "New York", "Oslo", "Lima", "Cairo", "Bern", "Quito", "Kyoto", "Dakar")
MATH: list[Row] = [
    {
        "id": f"m{index}",
        "prompt": [user(f"A farmer has {answer - 3} sheep and buys three at fair {index}. How many has she?")],
        "completion": [assistant(f"She has {answer - 3} + 3 = {answer} sheep.\n#### {answer}")],
        "answer": str(answer),
    }
    for index, answer in enumerate(NUMBERS)
]
SHORT: list[Row] = [
    {"id": f"c{index}", "prompt": [user(f"What is the largest city of country {index}?")], "answer": city}
    for index, city in enumerate(CITIES)
]
SUMMARIES: list[Row] = [
    {
        "id": f"s{index}",
        "prompt": [user(f"Summarize: {' '.join([f'{city} has markets and a river.'] * (4 + index))}")],
        "completion": [assistant(f"{city} has markets and a river{', ' * (index % 3)}.")],
    }
    for index, city in enumerate(CITIES)
]
CODE: list[Row] = [
    {
        "id": f"p{index}",
        "prompt": [user(f"Write add{index}(x), which adds {index}.")],
        "completion": [assistant(f"def add{index}(x):\n    return x + {index}")],
        "tests": [f"assert add{index}({value}) == {value + index}" for value in (0, 2)],
    }
    for index in range(1, 11)
]
_noise = random.Random(1)


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d[\d,]*", text)
    return numbers[-1].replace(",", "") if numbers else None


def correct(row: Row, text: str) -> float:
    return float(last_number(text) == row["answer"])


def boxed(row: Row, text: str) -> float:
    match = re.search(r"#### (\S+)", text)
    return float(match is not None and match[1].replace(",", "") == row["answer"])


def overlap(expected: str, text: str) -> float:
    wanted, words = set(expected.lower().split()), set(text.lower().split())
    return 2 * len(wanted & words) / (len(wanted) + len(words)) if wanted and words else 0.0


def run_tests(row: Row, text: str) -> float:
    try:
        scope: dict[str, object] = {}
        exec(text, scope)
        for test in row["tests"]:
            exec(test, scope)
    except Exception:
        return 0.0
    return 1.0


def crash(row: Row, text: str) -> float:
    return float("/" in text and int(text.split("/")[0]) / int(text.split("/")[1]) > 2) or correct(row, text)


FLAWED: dict[str, tuple[Rule, Sequence[Row]]] = {
    "format only": (lambda row, text: float("####" in text), MATH),
    "length": (lambda row, text: float(len(text)), MATH),
    "length, capped": (lambda row, text: min(len(text) / 200, 1.0), SHORT),
    "brevity": (lambda row, text: 1 / (1 + len(text)), MATH),
    "style": (lambda row, text: text.count("e") / (1 + len(text)), MATH),
    "correct and length": (lambda row, text: correct(row, text) + len(text) / 100, MATH),
    "substring": (lambda row, text: float(row["answer"] in text.replace(",", "")), MATH),
    "substring of a city": (lambda row, text: float(row["answer"].lower() in text.lower()), SHORT),
    "any number": (lambda row, text: float(row["answer"] in re.findall(r"\d+", text)), MATH),
    "prefix": (lambda row, text: float((last_number(text) or "").startswith(row["answer"])), MATH),
    "recall of words": (lambda row, text: float(set(row["answer"].split()) <= set(text.split())), SHORT),
    "constant": (lambda row, text: 0.5, MATH),
    "noise": (lambda row, text: correct(row, text) + _noise.random(), MATH),
    "sign": (lambda row, text: -correct(row, text), MATH),
    "case": (lambda row, text: float(text.lower() == row["answer"]), SHORT),
    "crash": (crash, MATH),
    "crash at no number": (lambda row, text: float(int(re.findall(r"\d+", text)[-1]) == int(row["answer"])), MATH),
    "copy of the prompt": (
        lambda row, text: difflib.SequenceMatcher(None, text, row["prompt"][-1]["content"]).ratio(),
        MATH,
    ),
    "prompt only": (lambda row, text: float(len(row["prompt"][-1]["content"])), MATH),
    "first digit": (lambda row, text: float((last_number(text) or " ")[0] == row["answer"][0]), MATH),
}
GOOD: dict[str, tuple[Rule, Sequence[Row]]] = {
    "last number": (correct, MATH),
    "marked number": (boxed, MATH),
    "exact": (lambda row, text: float(text.strip().lower() == row["answer"].lower()), SHORT),
    "style without reference": (lambda row, text: -float(text.count(",")), SUMMARIES),
    "short answers": (lambda row, text: 1.0 / max(1.0, len(text.split()) / 10), SUMMARIES),
    "length of a summary": (
        lambda row, text: -abs(len(text) / len(row["prompt"][-1]["content"]) - 0.2),
        SUMMARIES,
    ),
    "code": (run_tests, CODE),
    "similarity": (
        lambda row, text: difflib.SequenceMatcher(None, row["completion"][-1]["content"], text).ratio(),
        SUMMARIES,
    ),
    "partial credit": (lambda row, text: overlap(row["answer"], text), SHORT),
    "weighted parts": (
        lambda row, text: correct(row, text) + 0.2 * ("####" in text) - 0.1 * min(len(text) / 2000, 1),
        MATH,
    ),
}


def refusal(rule: Rule, rows: Sequence[Row], **fields: object) -> str | None:
    """Return the message that refuses a reward; None if it is accepted."""

    def score(rows: list[Row], responses: list[str]) -> list[float]:
        return [rule(row, text) for row, text in zip(rows, responses, strict=True)]

    part = Part("function", 1.0, FunctionScorer("my_rewards:rule", score, label="function"))
    try:
        refuse_problems(validate_parts([part], rows, ScoreValidation.model_validate(fields)), "ppo")
    except UserError as error:
        return str(error)
    return None


def test_most_flawed_rewards_are_refused() -> None:
    accepted = [name for name, (rule, rows) in FLAWED.items() if refusal(rule, rows) is None]
    assert accepted == []


@pytest.mark.parametrize("name", GOOD)
def test_good_reward_is_accepted(name: str) -> None:
    assert refusal(*GOOD[name]) is None


def test_message_names_the_function_and_a_line_that_works() -> None:
    message = refusal(*FLAWED["style"])
    assert message is not None
    assert "'my_rewards:rule' reads neither the row's answer nor its prompt" in message
    assert "`score_validation: {waive: [row]}`" in message
    assert refusal(*FLAWED["style"], waive=["row"]) is None


def test_waived_check_leaves_the_others() -> None:
    message = refusal(*FLAWED["substring"], waive=["wrong"])
    assert message is not None and "gives a list of answers" in message and "{waive: [wrong, hedged]}" in message
    assert refusal(*FLAWED["substring"], waive=["wrong", "hedged"]) is None
