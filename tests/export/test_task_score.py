"""The task score of an export: which answers count as solved, and what the numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.data.families.embedded import generate
from align.export.task_score import SEED, change_of_share, check_answers, solved_share, task_prompts
from align.models.loading import load_tokenizer


def test_correct_replies_are_solved_and_cut_ones_not(tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    replies = [row["completion"][0]["content"] for row in generate(40, SEED)]
    answers = [[*tokenizer(reply).input_ids, tokenizer.eos_token_id] for reply in replies]
    assert check_answers(tiny_model, answers) == [1.0] * 40
    answers[3] = answers[3][:2]
    assert check_answers(tiny_model, answers) == [1.0] * 3 + [0.0] + [1.0] * 36
    assert check_answers(tiny_model, []) == []


def test_prompts_are_the_instructions_in_the_template(tiny_model: Path) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    texts = [tokenizer.decode(prompt) for prompt in task_prompts(tiny_model, 5)]
    for row, text in zip(generate(5, SEED), texts, strict=True):
        assert row["prompt"][0]["content"] in text
    assert all(text.rstrip().endswith("assistant") for text in texts)


def test_share_and_change_have_intervals() -> None:
    before = [1.0] * 30 + [0.0] * 70
    after = [1.0] * 20 + [0.0] * 80
    share = solved_share(before)
    assert share is not None and share.value == pytest.approx(0.3)
    # Wilson (1927): center (0.3 + 1.92 / 100) / (1 + 3.84 / 100) = 0.3074, half width 0.0884.
    assert share.low == pytest.approx(0.2189, abs=1e-3) and share.high == pytest.approx(0.3958, abs=1e-3)
    change = change_of_share(after, before)
    assert change is not None and change.value == pytest.approx(-0.1) and change.low < -0.1 < change.high < 0
    assert solved_share([]) is None and change_of_share([], []) is None
