"""Keys and draws that splits are made by, and the validation rows of a training stage.

A stage that selects a checkpoint takes validation rows from its ``train`` split, so that nothing is selected on the
``test`` split, which evaluations report on. The split of a dataset is a step of its build.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from align.data.rows import Row, is_text, normalized, prompt_key

LARGEST_SHARE = 5
"""At most one in this many questions, and rows, of a ``train`` split becomes validation."""


def group(row: Row) -> str:
    """Return the key of rows that must be in the same split: the first user turn, normalized.

    Conversations that grow from one question share it, so that splits cut by the full prompt would leak. A plain text
    is a group by itself, as is a prompt without a user's turn.
    """
    if is_text(row):
        return normalized(row["text"])
    users = (normalized(message["content"]) for message in row["prompt"] if message["role"] == "user")
    return next(users, prompt_key(row))


def share(text: str, seed: int | str) -> float:
    """Return a number in [0, 1) that text and seed decide, the same on every machine."""
    # A hash instead of a generator: adding or removing rows changes no other row's number.
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def hold_back(rows: Sequence[Row], most: int) -> tuple[list[Row], list[Row]]:
    """Divide a ``train`` split into training rows and at most ``most`` validation rows.

    Validation rows are full groups, at most a fifth of the groups and of the rows, in an order that the first questions
    alone decide: every stage holds back the same rows. Where no group is small enough, it is the smallest one. The
    training rows keep their order; there are none where there is a single group.
    """
    keys = [group(row) for row in rows]
    sizes = Counter(keys)
    order = sorted(sizes, key=lambda key: (share(key, "validation"), key))
    validation: set[str] = set()
    # Full groups are held back until the limit, so no question is on both sides.
    left = min(most, len(rows) // LARGEST_SHARE)
    # A group that is too large is passed over, and smaller ones behind it may still fit.
    for key in order[: max(1, len(order) // LARGEST_SHARE)]:
        if sizes[key] <= left:
            validation.add(key)
            left -= sizes[key]
    if order and not validation:
        validation = {min(order, key=lambda key: sizes[key])}
    training_rows = [row for row, key in zip(rows, keys, strict=True) if key not in validation]
    return training_rows, [row for row, key in zip(rows, keys, strict=True) if key in validation]
