"""What splits go by: a row's first question, and a draw that it and the seed decide.

Also the validation rows that a stage which chooses a checkpoint takes out of its ``train`` split, so that nothing is
chosen on the ``test`` split, which evaluations report on. Splitting a dataset is a step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from align.data.rows import Row, is_text, normalized, prompt_key

LARGEST_SHARE = 5
"""At most one in so many questions, and rows, of a ``train`` split becomes validation."""


def group(row: Row) -> str:
    """What keeps rows on one side: the first user turn, normalized.

    Conversations that grow from one question share it, and so would leak between splits cut by the whole prompt. A
    plain text is its own group, as is a prompt without a user's turn.
    """
    if is_text(row):
        return normalized(row["text"])
    users = (normalized(message["content"]) for message in row["prompt"] if message["role"] == "user")
    return next(users, prompt_key(row))


def share(text: str, seed: int | str) -> float:
    """A number in [0, 1) that text and seed decide, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def hold_back(rows: Sequence[Row], most: int) -> tuple[list[Row], list[Row]]:
    """Part a ``train`` split into rows to learn from and at most ``most`` rows to choose a checkpoint by.

    Whole groups are taken, a fifth of them and of the rows at most, in an order that their first questions alone
    decide: every stage that chooses on these rows takes the same ones. Where none is small enough, it is the smallest.
    The rest keeps its order; it is empty where there is a single group.
    """
    keys = [group(row) for row in rows]
    sizes = Counter(keys)
    order = sorted(sizes, key=lambda key: (share(key, "validation"), key))
    taken: set[str] = set()
    left = min(most, len(rows) // LARGEST_SHARE)
    for key in order[: max(1, len(order) // LARGEST_SHARE)]:
        if sizes[key] <= left:
            taken.add(key)
            left -= sizes[key]
    if order and not taken:
        taken = {min(order, key=lambda key: sizes[key])}
    learned = [row for row, key in zip(rows, keys, strict=True) if key not in taken]
    return learned, [row for row, key in zip(rows, keys, strict=True) if key in taken]
