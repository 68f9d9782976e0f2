"""Rows for KTO: single answers, desirable or not, each with a mismatched answer to another prompt.

KTO's reference point is the mean drift over answers that do not belong to their prompts. trl estimates it per
micro-batch, from the micro-batch's own answers shifted by one, which needs fixed micro-batches. So rows are grouped
once, by length, and every epoch shuffles the groups. ``rows.py`` tokenizes turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from align.models.chat.render import assistant_mask, split_answer
from align.training.order import grouped_order
from align.training.rows import (
    NO_ROOM,
    NOT_TRAINED,
    REWRITTEN,
    TOO_LONG,
    Encoded,
    Row,
    add_masks,
)

SIDES = (("chosen", True), ("rejected", False))


def unpair(rows: Sequence[Row]) -> list[Row]:
    """Return rows with ``completion`` and ``label``: unpaired rows as they are, two rows for each pair."""
    answers: list[Row] = []
    for row in rows:
        if row.get("label") is not None:
            answers.append(row)
            continue
        shared_fields = {
            name: value for name, value in row.items() if not name.startswith(("chosen", "rejected", "completion"))
        }
        for side, is_desirable in SIDES:
            completion_finished = row.get(f"{side}_finished")
            answers.append(
                {
                    **shared_fields,
                    "completion": row[side],
                    "completion_finished": completion_finished,
                    "label": is_desirable,
                }
            )
    return answers


def encode_unpaired(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Encode ``prompt_ids``, ``completion_ids`` and ``label`` of each answer; skip answers that are too long.

    If an answer has several turns, all rows also have ``completion_mask``, as in ``encode_pairs``.
    """
    out = Encoded()
    masks: list[list[int]] = []
    for row in rows:
        prompt_ids, answer_ids = split_answer(tokenizer, row, "completion")
        length = len(prompt_ids) + len(answer_ids)
        if len(prompt_ids) >= max_length:
            out.count(NO_ROOM, length)
            continue
        if length > max_length:
            out.count(TOO_LONG, length)
            continue
        mask = assistant_mask(tokenizer, row, "completion", prompt_ids, answer_ids)
        if mask is None:
            out.count(REWRITTEN)
            continue
        if not any(mask):
            out.count(NOT_TRAINED)
            continue
        encoded_row: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "completion_ids": answer_ids,
            "label": bool(row["label"]),
        }
        out.add(encoded_row, length, row)
        masks.append(mask)
    add_masks(out, {"completion_mask": masks})
    return out


def fixed_groups(lengths: Sequence[int], micro_batch: int, batch: int, seed: int) -> list[list[int]]:
    """Return micro-batches of rows of similar length, the same for the whole run; only the last may be short."""
    order = grouped_order(lengths, micro_batch, batch, seed, epoch=0)
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


class GroupOrder:
    """Sampler that shuffles fixed micro-batches, as a function of seed and epoch only."""

    def __init__(self, groups: Sequence[Sequence[int]], seed: int) -> None:
        self.groups = groups
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        # trl cuts the sequence into micro-batches of one size, so a short group may only come at the end.
        size = len(self.groups[0])
        full = [group for group in self.groups if len(group) == size]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(full))
        yield from (row for index in order for row in full[index])
        yield from (row for group in self.groups if len(group) != size for row in group)


def add_mismatched(rows: Sequence[dict[str, Any]], groups: Sequence[Sequence[int]], max_length: int) -> int:
    """Add ``KL_completion_ids`` to each row, with its mask: another row's answer, if possible to another prompt.

    A group's answers are shifted by the number of positions that returns the fewest to their own prompt; the two sides
    of a pair share a prompt and have similar lengths, so a shift by one is not always best. Returns the number of rows
    that still have an answer to their own prompt.
    """
    same_prompt = 0
    for number, group in enumerate(groups):
        # A group of one row borrows the first row of the group before.
        donors = list(group) if len(group) > 1 else [*group, groups[number - 1][0]]
        # For every possible shift, count the rows that would get an answer to their own prompt, and use the best shift.
        counts = {
            shift: sum(_same_prompt(rows, donors, index, shift) for index in range(len(group)))
            for shift in range(1, len(donors))
        }
        best = min(counts, key=lambda shift: (counts[shift], shift), default=0)
        same_prompt += counts.get(best, 1)
        for index, row in enumerate(group):
            # The borrowed answer is cut to the room that this prompt leaves.
            donor = rows[donors[index - best]]
            room = max_length - len(rows[row]["prompt_ids"])
            for name in ("completion_ids", "completion_mask"):
                if name in donor:
                    rows[row][f"KL_{name}"] = donor[name][:room]
    return same_prompt


def _same_prompt(rows: Sequence[dict[str, Any]], group: Sequence[int], index: int, shift: int) -> bool:
    return bool(rows[group[index]]["prompt_ids"] == rows[group[index - shift]]["prompt_ids"])
