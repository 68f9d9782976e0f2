"""Functions that tests name as tools, and functions that score episodes with them."""

from __future__ import annotations

import asyncio
from typing import Any


def double(number: int) -> int:
    """Double a number.

    Args:
        number: The number to double.
    """
    return 2 * number


async def shout(text: str, times: int = 1) -> str:
    """Write in capitals.

    Args:
        text: What to write.
        times: How often.
    """
    await asyncio.sleep(0)
    return text.upper() * times


def by_messages(row: dict[str, Any], messages: list[dict[str, Any]], factor: float = 1.0) -> float:
    return factor * len(messages)


def by_response(row: dict[str, Any], response: str) -> dict[str, float]:
    return {"score": float(response == row["goal"]), "length": len(response)}


def in_lists(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


async def slowly(row: dict[str, Any], response: str) -> float:
    await asyncio.sleep(0)
    return 0.5
