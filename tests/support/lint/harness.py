"""Clean rows, their tokens, and the linter's findings after something was spoiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.data.rows import assistant, user, write_rows
from align.lint.encodings import encoding_of
from align.lint.findings import Finding
from align.lint.linter import NO_LIMIT, Linter, Options
from align.models.chat.render import render_conversation, render_prompt

Row = dict[str, Any]
Prepared = list[dict[str, list[int]]]
SPOILT = 3
"""Index of the row that a test spoils; its conversation has two exchanges."""

ASKED = [
    "rivers",
    "bridges",
    "violins",
    "comets",
    "beetles",
    "lanterns",
    "harbors",
    "glaciers",
    "orchards",
    "windmills",
]


def clean(count: int = 8) -> list[Row]:
    """Rows without fault: every second one has an exchange before its question. Both answers of a pair differ."""
    rows = []
    for number in range(count):
        question_word, answer_word = ASKED[number % len(ASKED)], ASKED[(number + 3) % len(ASKED)]
        before = [
            user(f"I like {answer_word}, number {number}."),
            assistant(f"So do I; {answer_word} are fine things."),
        ]
        rows.append(
            {
                "id": f"row-{number}",
                "source": "test",
                "checks": "",
                "prompt": [
                    *(before if number % 2 else []),
                    user(f"Name {number + 2} facts about {question_word}, please."),
                ],
                "completion": [assistant(f"There are {number + 7} kinds of {question_word}, and they last.")],
                "chosen": [assistant(f"There are {number + 7} kinds of {question_word}, and they last.")],
                "rejected": [
                    assistant(
                        f"Nobody knows about {question_word}" + (", and nobody ever will." if number % 2 else ".")
                    )
                ],
            }
        )
    return rows


def instructions(count: int = 8) -> list[Row]:
    """The same, answers to learn only."""
    return [{name: value for name, value in row.items() if name not in ("chosen", "rejected")} for row in clean(count)]


def pairs(count: int = 8) -> list[Row]:
    """The same, pairs only."""
    return [{name: value for name, value in row.items() if name != "completion"} for row in clean(count)]


def encoded(tokenizer: Any, rows: Sequence[Row], stage: str = "sft") -> Prepared:
    """The rows as the stage prepares them."""
    encode = encoding_of(stage).encode
    assert encode is not None
    return [dict(row) for row in encode(tokenizer, rows, NO_LIMIT).rows]


def spans(tokenizer: Any, row: Row) -> list[tuple[int, int]]:
    """Return the span of each answer in the row's ids, its end of turn included."""
    messages, tools = [*row["prompt"], *row["completion"]], row.get("tools")
    values = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(render_prompt(tokenizer, messages[:index], tools))
            values.append((start, len(render_conversation(tokenizer, messages[: index + 1], tools=tools))))
    return values


def all_answers(tokenizer: Any, rows: Sequence[Row]) -> Prepared:
    """The rows with labels on every answer, as a mask of the assistant's turns gives them."""
    encoding = encoded(tokenizer, rows)
    for row, prepared in zip(rows, encoding, strict=True):
        for start, end in spans(tokenizer, row):
            prepared["labels"][start:end] = prepared["input_ids"][start:end]
    return encoding


def look(
    tokenizer: Any,
    rows: Sequence[Row],
    prepared: Prepared | None = None,
    collator: Callable[[Any], Any] | None = None,
    options: Options | None = None,
    test: Sequence[Row] = (),
) -> dict[str, Finding]:
    """Findings by name. ``made`` are the trainer's rows, encoded here when None."""
    linter = Linter(tokenizer, options or Options())
    chosen_collator = collator or linter.encoding.default_collator(tokenizer)
    linter.look("train", rows, chosen_collator, None if prepared is None else prepared.__getitem__)
    if test:
        linter.look("test", test, chosen_collator)
    return {finding.name: finding for finding in linter.result()}


def alarms(result: dict[str, Finding]) -> set[str]:
    """Names of the errors and warnings."""
    return {name for name, finding in result.items() if finding.severity != "note"}


def dataset(folder: Path, train: list[Row], test: list[Row]) -> Path:
    """A built folder in shards."""
    half = len(train) // 2
    write_rows(folder / "train-00000-of-00002.parquet", train[:half])
    write_rows(folder / "train-00001-of-00002.parquet", train[half:])
    write_rows(folder / "test.parquet", test)
    return folder
