"""Duplicates among rows: the texts that are compared, and the row that stands for each cluster. Torch-free."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from align.config.recipe.step_settings import ComparedPart
from align.data.row_texts import is_bad_reply, reply_texts
from align.data.rows import Row, is_text, normalized, prompt_key
from align.errors import UserError


def reply_texts_with_marks(row: Row) -> list[tuple[str, int]]:
    """Return each text of the replies, with 1 where it is not to be imitated, else 0."""
    return [(text, int(is_bad_reply(row, field))) for field, text in reply_texts(row, "both")]


def compared_texts(row: Row, part: ComparedPart) -> list[tuple[str, int]]:
    """Return the texts to compare, with their marks. System turns are left out: all rows of a source may share one."""
    if is_text(row):
        return [(row["text"], 0)]
    texts: list[tuple[str, int]] = []
    if part != "reply":
        texts += [(message.get("content") or "", 0) for message in row["prompt"] if message["role"] != "system"]
    if part != "prompt":
        texts += reply_texts_with_marks(row)
    return texts


def comparison_key(row: Row, part: ComparedPart) -> str:
    """Return a text that is equal for rows of equal content; case, punctuation and white space do not count."""
    if is_text(row):
        return prompt_key(row)
    content: list[Any] = [] if part == "reply" else [prompt_key(row)]
    if part != "prompt":
        # The mark keeps a row apart from one with chosen and rejected exchanged.
        content += [[normalized(text), mark] for text, mark in reply_texts_with_marks(row)]
    return json.dumps(content)


def check_part(part: ComparedPart, kind: str, step: str) -> None:
    """Raise ``UserError`` where rows of this kind have no such part."""
    if part == "reply" and kind == "prompts":
        raise UserError(
            f"{step}: 'of: reply' in a recipe of kind prompts, whose rows have no reply; write 'of: prompt'."
        )
    if part != "row" and kind == "texts":
        raise UserError(f"{step}: 'of: {part}' in a recipe of kind texts, whose rows have no turns; write 'of: row'.")


def join(label: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Give rows that pairs connect one label, the least. ``label`` always points to the first row of each cluster.

    ``label`` (N,) is changed in place; ``left`` and ``right`` (P,) are the rows of each pair.
    """
    while True:
        # Union-find over arrays: hook roots onto smaller ones, compress paths, and repeat with the pairs still apart.
        ends = np.sort(np.stack([label[left], label[right]]), axis=0)
        apart = ends[0] != ends[1]
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        # Point the later cluster at the earlier one, then follow the pointers until every row points at a first row.
        np.minimum.at(label, ends[1][apart], ends[0][apart])
        while not np.array_equal(target := label[label], label):
            label[:] = target


def first_equal(keys: np.ndarray) -> np.ndarray:
    """Return (N,) int64: for each row the first row with its key."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    rows: np.ndarray = first[inverse.reshape(-1)].astype(np.int64)
    return rows


def first_stays(count: int, places: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``code`` and ``instead`` of a verdict on ``count`` rows that drops all but the first of each cluster.

    ``places`` (M,) are the rows that were compared, ``label`` (M,) the place among them of the row that stands for
    each. The dropped rows get reason 0.
    """
    is_later = label != np.arange(len(places))
    code = np.full(count, -1, dtype=np.int32)
    instead = np.full(count, -1, dtype=np.int64)
    code[places[is_later]] = 0
    instead[places[is_later]] = places[label[is_later]]
    return code, instead
