"""Which rows are for training and which for testing: by prompt, never by row."""

from __future__ import annotations

import hashlib

from align.data.rows import Row, normalised


def group(row: Row) -> str:
    """What keeps rows on one side: the first user turn, normalised.

    Conversations that grow from one question share it, and so would leak between splits cut by the whole prompt.
    """
    return next(normalised(message["content"]) for message in row["prompt"] if message["role"] == "user")


def share(text: str, seed: int) -> float:
    """A number in [0, 1) that text and seed decide, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def split(rows: list[Row], test_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and test rows: a group is tested when its draw falls below ``test_size``.

    A prompt's side depends on nothing but itself, so recipes that share prompts, seed and ``test_size`` agree. With
    two groups or more neither side is empty.
    """
    draws = {name: share(name, seed) for name in dict.fromkeys(group(row) for row in rows)}
    tested = {name for name, draw in draws.items() if draw < test_size}
    if len(draws) > 1 and not tested:
        tested = {min(draws, key=draws.__getitem__)}
    if len(draws) > 1 and len(tested) == len(draws):
        tested.remove(max(draws, key=draws.__getitem__))
    train = [row for row in rows if group(row) not in tested]
    return train, [row for row in rows if group(row) in tested]


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """``count`` rows in their order, chosen by their ids and the seed."""
    chosen = sorted(range(len(rows)), key=lambda index: (share(rows[index]["id"], seed), index))[:count]
    return [rows[index] for index in sorted(chosen)]
