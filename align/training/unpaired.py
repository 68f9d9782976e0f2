"""Rows for KTO: single answers that are wanted or not, each with an answer to another prompt beside it.

KTO's reference point is the mean drift over answers that do not belong to their prompts. trl estimates it per
micro-batch, from the micro-batch's own answers moved on by one; that needs micro-batches which stay together. So rows
are grouped once, by length, and every epoch shuffles the groups. Leaves out tokenizing (``rows.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from align.training.order import grouped_order
from align.training.rows import NO_ROOM, TOO_LONG, Encoded, Row, split_answer

SIDES = (("chosen", True), ("rejected", False))


def unpair(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``completion`` and ``label``: those there are, and two of each pair."""
    made: list[Row] = []
    for row in rows:
        if row.get("label") is not None:
            made.append(row)
            continue
        kept = {name: value for name, value in row.items() if not name.startswith(("chosen", "rejected", "completion"))}
        for side, wanted in SIDES:
            finished = row.get(f"{side}_finished")
            made.append({**kept, "completion": row[side], "completion_finished": finished, "label": wanted})
    return made


def encode_unpaired(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """``prompt_ids``, ``completion_ids`` and ``label`` of each answer; too long ones are left out, not cut."""
    out = Encoded()
    for row in rows:
        prompt_ids, answer_ids = split_answer(tokenizer, row, "completion")
        if len(prompt_ids) >= max_length:
            out.count(NO_ROOM)
            continue
        length = len(prompt_ids) + len(answer_ids)
        if length > max_length:
            out.count(TOO_LONG)
            continue
        made: dict[str, Any] = {"prompt_ids": prompt_ids, "completion_ids": answer_ids, "label": bool(row["label"])}
        out.add(made, length, row)
    return out


def fixed_groups(lengths: Sequence[int], micro_batch: int, batch: int, seed: int) -> list[list[int]]:
    """Micro-batches of row numbers of like length, the same for the whole run; only the last may be short."""
    order = grouped_order(lengths, micro_batch, batch, seed, epoch=0)
    return [order[at : at + micro_batch] for at in range(0, len(order), micro_batch)]


class GroupOrder:
    """A sampler that keeps micro-batches together and shuffles them, a function of seed and epoch alone."""

    def __init__(self, groups: Sequence[Sequence[int]], seed: int) -> None:
        self.groups, self.seed, self.epoch = groups, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        size = len(self.groups[0])
        full = [group for group in self.groups if len(group) == size]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(full))
        yield from (row for at in order for row in full[at])
        yield from (row for group in self.groups if len(group) != size for row in group)


def add_mismatched(rows: Sequence[dict[str, Any]], groups: Sequence[Sequence[int]], max_length: int) -> int:
    """Give each row ``KL_completion_ids``, another row's answer, from its own group where that has another prompt.

    A group's answers are moved on by as many places as bring the fewest back to their own prompt: the two sides of a
    pair have one, and like lengths. Returns how many rows still have an answer to their own prompt.
    """
    own = 0
    for number, group in enumerate(groups):
        donors = list(group) if len(group) > 1 else [*group, groups[number - 1][0]]  # a group of one borrows
        shifts = range(1, len(donors))
        counts = {shift: sum(_same_prompt(rows, donors, at, shift) for at in range(len(group))) for shift in shifts}
        shift = min(counts, key=lambda one: (counts[one], one), default=0)
        own += counts.get(shift, 1)
        for at, row in enumerate(group):
            answer = rows[donors[at - shift]]["completion_ids"]
            rows[row]["KL_completion_ids"] = answer[: max_length - len(rows[row]["prompt_ids"])]
    return own


def _same_prompt(rows: Sequence[dict[str, Any]], group: Sequence[int], at: int, shift: int) -> bool:
    return bool(rows[group[at]]["prompt_ids"] == rows[group[at - shift]]["prompt_ids"])
