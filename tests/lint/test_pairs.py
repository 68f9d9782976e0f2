"""What many pairs show together: a length that decides, and sides that were swapped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from align.cli.main import main
from align.data.rows import Row, assistant, user
from align.lint.across_rows import check_with_reward_model
from align.lint.findings import Findings, Place
from align.lint.linter import Options
from tests.support.lint.dialects import tokenizer_of
from tests.support.lint.harness import alarms, dataset, instructions, look, pairs


def row_of(number: int, chosen: str, rejected: str) -> Row:
    return {
        "id": f"row-{number}",
        "prompt": [user(f"Name {number} facts about rivers and harbors, please.")],
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
    }


@pytest.mark.parametrize(("longer", "is_biased"), [(104, True), (89, False), (70, False)])
def test_length_bias_of_119_pairs(longer: int, is_biased: bool) -> None:
    """104 of 119 is 0.87 with a 95 % interval of 0.80 to 0.92; 89 is 0.75 with 0.66 to 0.82."""
    rows = []
    for number in range(119):
        long, short = f"{number} rivers, harbors and boats" + " and more" * (number % 5), f"{number} rivers"
        rows.append(row_of(number, long, short) if number < longer else row_of(number, short, long))
    findings = look(tokenizer_of("chatml"), rows, options=Options("dpo"))
    assert ("length-bias" in findings) == is_biased


def swapped_rows(share: float, seed: int, count: int = 100) -> list[Row]:
    """Pairs of an answer to the question and one beside the point, equally long, some of them swapped."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        about = f"There are {number} facts about rivers and harbors."
        aside = f"Some {number} songs were sung on an old violin, said she."
        aside = aside[: len(about) - 1] + "."
        swap = generator.random() < share
        rows.append(row_of(number, aside, about) if swap else row_of(number, about, aside))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_swapped_sides_show_in_the_words_of_the_prompt(seed: int) -> None:
    findings = look(tokenizer_of("chatml"), swapped_rows(0.3, seed), options=Options("dpo"))
    assert alarms(findings) == {"sides-swapped"}
    assert "by words of the prompt" in findings["sides-swapped"].examples[0].excerpt


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_few_swaps_or_weak_feature_is_no_finding(share: float) -> None:
    assert "sides-swapped" not in look(tokenizer_of("chatml"), swapped_rows(share, 1), options=Options("dpo"))


def test_taste_is_no_swap() -> None:
    """Differences that gather around zero are what people's preferences look like: hh-rlhf's do."""
    generator = random.Random(4)
    rows = []
    for number in range(200):
        lengths = [int(generator.lognormvariate(2.5, 0.6)) + 2 for _ in range(2)]
        first, second = (" ".join(["word", str(number), *["fact"] * length]) for length in lengths)
        prefers_longer = generator.random() < 0.65
        longer, shorter = (first, second) if len(first) > len(second) else (second, first)
        rows.append(row_of(number, longer, shorter) if prefers_longer else row_of(number, shorter, longer))
    assert "sides-swapped" not in look(tokenizer_of("chatml"), rows, options=Options("dpo"))


def scores_of(rows: list[Row], margin: float, swapped: int) -> dict[str, float]:
    """Scores by answer: chosen ones lead by ``margin``, and trail by it in the first ``swapped`` rows."""
    scores = {}
    for number, row in enumerate(rows):
        lead = -margin if number < swapped else margin
        scores[row["chosen"][0]["content"]] = lead
        scores[row["rejected"][0]["content"]] = 0.0
    return scores


@pytest.mark.parametrize(
    ("margin", "swapped", "count"),
    [
        (3.0, 30, 30),
        (3.0, 15, 0),
        (1.0, 30, 0),
    ],  # a third, a seventh (interval from 0.09), and a model that is not sure
)
def test_a_reward_model_tells_swapped_sides(margin: float, swapped: int, count: int) -> None:
    rows = [row_of(number, f"yes, {number}", f"no, {number}") for number in range(100)]
    scores, findings = scores_of(rows, margin, swapped), Findings()
    placed = [(Place("train", number + 1), row) for number, row in enumerate(rows)]
    check_with_reward_model(
        placed, lambda prompts, answers, finished, tools: [scores[answer] for answer in answers], findings
    )
    assert [finding.count for finding in findings.result()] == ([count] if count else [])


def test_the_command_asks_a_reward_model(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    """An untrained model is not sure of anything, so it finds no fault; rows without sides are refused."""
    rows = pairs(60)
    dataset(tmp_path, rows[:50], rows[50:])
    command = ["data", "lint", str(tmp_path), "--model", str(tiny_model), "--reward", str(tiny_reward)]
    assert main(command) == 0
    dataset(tmp_path, instructions(8), instructions(10)[8:])
    assert main(command) == 2
