"""What splits go by: a row's first question, and a draw that it and the seed decide. Splitting itself is a step."""

from __future__ import annotations

import hashlib

from align.data.rows import Row, is_text, normalised


def group(row: Row) -> str:
    """What keeps rows on one side: the first user turn, normalised.

    Conversations that grow from one question share it, and so would leak between splits cut by the whole prompt. A
    plain text is its own group.
    """
    if is_text(row):
        return normalised(row["text"])
    return next(normalised(message["content"]) for message in row["prompt"] if message["role"] == "user")


def share(text: str, seed: int) -> float:
    """A number in [0, 1) that text and seed decide, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56
