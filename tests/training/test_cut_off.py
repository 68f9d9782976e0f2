"""An answer that was cut off at its length limit gets no end of turn, on any road from rows to trained tokens."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.converters import convert_kind
from align.data.rows import read_rows, write_rows
from align.evaluation.logprobs import heldout_losses
from align.models.chat.render import render_answered, split_answer
from align.models.loading import load_tokenizer
from align.report.dataset.preview import token_views
from align.rl.prompts import PtxRows
from align.training.reward_objectives import Scale, encode_scored, encode_steps, scored_answers, stepwise_answers
from align.training.rows import (
    MASKED,
    document_ends,
    encode_answers,
    encode_conversations,
    encode_pairs,
    encode_supervised,
    encode_texts,
)
from align.training.unpaired import encode_unpaired, unpair
from tests.support.training.harness import rows

Row = dict[str, Any]
Ids = list[int]
PACKAGES = ("training", "rl", "stages")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def learned(row: dict[str, Ids]) -> Ids:
    """The labels of a row that was not masked away."""
    return [label for label in row["labels"] if label != MASKED]


def pair() -> Row:
    return {name: value for name, value in rows(1)[0].items() if name != "completion"}


def answered() -> Row:
    row = rows(1)[0]
    return {"prompt": row["prompt"], "completion": row["completion"], "label": True, "score": 1.0}


def steps() -> Row:
    row = answered()
    answer = row["completion"][0]["content"]
    return {**row, "steps": [{"content": "so", "label": 1.0}, {"content": answer, "label": 1.0}]}


def texts(tokenizer: Any, row: Row) -> Ids:
    (text,) = convert_kind(row, "texts")
    (encoded,) = encode_texts(tokenizer, [text], 200, document_ends(tokenizer, None, "pretrain")).rows
    return learned(encoded)


ROADS: dict[str, tuple[str, Callable[[], Row], Callable[[Any, Row], Ids]]] = {
    "sft": ("completion", answered, lambda t, r: learned(encode_supervised(t, [r], 99).rows[0])),
    "sft on pairs": ("chosen", pair, lambda t, r: learned(encode_supervised(t, [r], 99).rows[0])),
    "sft, every answer": ("chosen", pair, lambda t, r: learned(encode_answers(t, [r], 99).rows[0])),
    "dpo, chosen": ("chosen", pair, lambda t, r: encode_pairs(t, [r], 99).rows[0]["chosen_ids"]),
    "dpo, rejected": ("rejected", pair, lambda t, r: encode_pairs(t, [r], 99).rows[0]["rejected_ids"]),
    "kto": ("rejected", pair, lambda t, r: encode_unpaired(t, unpair([r])[1:], 99).rows[0]["completion_ids"]),
    "kto, labels": (
        "completion",
        answered,
        lambda t, r: encode_unpaired(t, unpair([r]), 99).rows[0]["completion_ids"],
    ),
    "reward": ("chosen", pair, lambda t, r: encode_conversations(t, [r], 99).rows[0]["chosen_ids"]),
    "regression": (
        "completion",
        answered,
        lambda t, r: encode_scored(t, scored_answers([r]), 99, Scale()).rows[0]["input_ids"],
    ),
    "process": (
        "completion",
        steps,
        lambda t, r: encode_steps(t, stepwise_answers([r], " ", "r"), 99, " ").rows[0]["input_ids"],
    ),
    "ptx": ("completion", answered, lambda t, r: PtxRows([r], t, 99).texts[0][1]),
    "ptx on pairs": ("chosen", pair, lambda t, r: PtxRows([r], t, 99).texts[0][1]),
    "texts of conversations": ("completion", answered, texts),
    "shown": ("completion", answered, lambda t, r: list(token_views(t, {**r, "label": True})[0].ids)),
}


@pytest.mark.parametrize("road", ROADS)
def test_no_end_of_turn_behind_an_answer_that_was_cut_off(road: str, tokenizer: Any) -> None:
    side, make, encode = ROADS[road]
    end = tokenizer.eos_token_id
    uninterrupted, message = encode(tokenizer, make()), encode(tokenizer, {**make(), f"{side}_finished": True})
    cut = encode(tokenizer, {**make(), f"{side}_finished": False})
    assert uninterrupted[-1] == end
    assert message == uninterrupted
    assert cut == uninterrupted[:-1]
    assert end != cut[-1]


def test_earlier_answers_of_a_conversation_keep_their_ends(tokenizer: Any) -> None:
    row = answered()
    talk = {**row, "prompt": [*row["prompt"], *row["completion"], *row["prompt"]], "completion_finished": False}
    ids = learned(encode_answers(tokenizer, [talk], 200).rows[0])
    answer = split_answer(tokenizer, talk)[1]
    assert ids == [*answer, tokenizer.eos_token_id, *answer]


def test_held_out_losses_are_of_what_was_written(tokenizer: Any) -> None:
    calls: list[Ids] = []

    def read(prompts: list[Ids], answers: list[Ids]) -> list[list[float]]:
        calls.extend(answers)
        return [[0.0] * len(answer) for answer in answers]

    row = answered()
    heldout_losses(read, tokenizer, [row, {**row, "completion_finished": False}], 99)
    assert calls[0] == [*calls[1], tokenizer.eos_token_id]


def test_mark_survives_conversion_between_kinds_and_disk(tmp_path: Path) -> None:
    row = {**pair(), "chosen_finished": False, "rejected_finished": True}
    (instruction,) = convert_kind(row, "instructions")
    desirable, undesirable = convert_kind(row, "unpaired")
    best = {"content": "b", "score": 2.0, "rank": None, "finished": False}
    (of_best,) = convert_kind(
        {"prompt": row["prompt"], "responses": [{**best, "score": 1.0, "finished": True}, best]}, "instructions"
    )
    assert isinstance(instruction, dict)
    assert instruction["completion"] == row["chosen"]
    marks = [answer["completion_finished"] for answer in (instruction, desirable, undesirable, of_best)]  # type: ignore[index]
    assert marks == [False, False, True, False]
    (again,) = convert_kind(instruction, "instructions")
    assert again == instruction
    for kind in ("prompts", "preferences"):
        (converted,) = convert_kind({**row, "completion_finished": False}, kind)
        assert "completion_finished" not in converted
    base = {"id": "1", "source": "s", "checks": ""}
    write_rows(tmp_path / "rows.parquet", [{**base, **instruction}, {**base, **rows(1)[0]}])
    assert [read["completion_finished"] for read in read_rows(tmp_path / "rows.parquet")] == [False, None]


def test_stages_go_by_one_road_alone() -> None:
    """What renders an answer without its row cannot know whether it came to its end."""
    for package in PACKAGES:
        for file in sorted((Path("align") / package).rglob("*.py")):
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
            by_hand = names & {"split_turn", "render_conversation", "apply_chat_template"}
            assert not by_hand, (file, by_hand)


def test_a_row_is_rendered_by_the_answer_that_is_learned(tokenizer: Any) -> None:
    row = {**rows(1)[0], "chosen_finished": False}
    assert render_answered(tokenizer, row)[-1] == tokenizer.eos_token_id
    assert render_answered(tokenizer, row, "chosen")[-1] != tokenizer.eos_token_id
