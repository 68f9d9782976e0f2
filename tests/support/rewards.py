"""Reward functions that tests name in ``score:``, of every form that there is."""

from __future__ import annotations

import asyncio
from typing import Any

Row = dict[str, Any]
WATCH = {"running": 0, "most": 0}
"""Calls of ``watched`` under way, and the most at once."""


def length(rows: list[Row], responses: list[str], limit: int = 100) -> list[float]:
    return [len(text) / limit for text in responses]


def vowels(row: Row, response: str, *, letters: str = "aeiou") -> dict[str, float]:
    count = sum(letter in letters for letter in response)
    result = {"score": count / max(1, len(response)), "characters": len(response)}
    # A metric that some responses lack.
    return result | ({"vowels": count} if count else {})


def needs_answer(rows: list[Row], responses: list[str], answer: str, other: int = 0) -> list[float]:
    return [float(text == answer) for text in responses]


def anything(rows: list[Row], responses: list[str], **options: Any) -> list[float]:
    return [float(len(options)) for _ in responses]


async def watched(row: Row, response: str) -> float:
    WATCH["running"] += 1
    WATCH["most"] = max(WATCH["most"], WATCH["running"])
    await asyncio.sleep(0.01)
    WATCH["running"] -= 1
    return float(len(response))


async def batched(rows: list[Row], responses: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [1.0 for _ in responses]


async def failing(row: Row, response: str) -> float:
    if response == "bad":
        raise RuntimeError("the sandbox is gone")
    await asyncio.sleep(60)
    return 0.0


def score_pieces(row: Row, response: str) -> list[float]:
    """The length of each step between two letters e."""
    return [float(len(piece.strip())) for piece in response.split("e") if piece.strip()]
