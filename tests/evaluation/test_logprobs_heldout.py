"""Held-out losses count what SFT trains on: turns of the assistant, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.data.rows import assistant, user, write_rows
from align.evaluation.logprobs import check_heldout, heldout_losses
from align.evaluation.plan import _fallback_examples
from align.models.loading import load_tokenizer
from align.store.artifacts import Artifact, Kind
from align.training.rows import MASKED, encode_supervised
from tests.support.chat_templates import THINKS
from tests.support.refusals import Refused

ONE = {"prompt": [user("2 + 3?")], "completion": [assistant("5")]}
TALK = {"prompt": [user("2 + 3?")], "completion": [assistant("5"), user("times 2"), assistant("ten")]}
SKIPPED = {**TALK, "completion": [assistant("5") | {"train": False}, *TALK["completion"][1:]]}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def by_token(prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """A model under which a token costs as many nats as its id."""
    return [[-float(token) for token in answer] for answer in answers]


@pytest.mark.parametrize("template", [None, THINKS])
@pytest.mark.parametrize("row", [ONE, TALK, SKIPPED])
def test_losses_are_those_of_the_tokens_that_sft_trains_on(
    row: dict[str, Any], template: str | None, tokenizer: Any
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    indices, [loss], [tokens] = heldout_losses(by_token, tokenizer, [row], 200)
    encoded = encode_supervised(tokenizer, [row], 200).rows
    trained = [label for part in encoded for label in part["labels"] if label != MASKED]
    assert (indices, tokens) == ([0], len(trained))
    assert loss == pytest.approx(sum(trained) / len(trained))


def test_rows_without_a_turn_to_train_on_are_left_out(refused: Refused, tokenizer: Any) -> None:
    unmarked = {**ONE, "completion": [assistant("5") | {"train": False}]}
    assert heldout_losses(by_token, tokenizer, [unmarked, TALK, ONE], 200)[0] == [1, 2]
    refused(check_heldout, tokenizer, [unmarked], 200)


def test_examples_are_drawn_from_rows_of_one_turn(tmp_path: Path) -> None:
    rows = [{"id": str(number), "source": "made", "checks": "", **row} for number, row in enumerate([TALK, ONE])]
    write_rows(tmp_path / "train.parquet", rows)
    artifact = Artifact("prompts", Kind.INSTRUCTIONS, tmp_path, {})
    context: Any = SimpleNamespace(inputs={"prompts": artifact}, seed=0)
    assert [example.answer for example in _fallback_examples(context, 2)] == ["5"]
