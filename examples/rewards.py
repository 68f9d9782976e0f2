"""Sums with known answers, and rewards for them: the functions that ``pipelines/rewards.yaml`` names in ``score:``.

A reward takes lists (``rows, responses``) or one of each (``row, response``); further parameters come from
``arguments:``. It returns a number per response, or a mapping with ``score`` and metrics that are logged beside it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any

NUMBER = re.compile(r"-?\d+")


def sums(count: int = 600, largest: int = 20, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield questions with their answers, as records of format ``gsm8k``; every sum at most once."""
    pairs = [(first, second) for first in range(1, largest + 1) for second in range(1, largest + 1)]
    random.Random(seed).shuffle(pairs)  # noqa: S311
    for first, second in pairs[:count]:
        yield {"question": f"What is {first} + {second}?", "answer": f"#### {first + second}"}


def exact_answer(row: dict[str, Any], response: str) -> dict[str, float]:
    """Return 1 for a response whose last number is the right answer; ``numbers`` counts the numbers in it."""
    numbers = NUMBER.findall(response)
    is_right = bool(numbers) and int(numbers[-1]) == int(json.loads(row["checks"])["answer"])
    return {"score": float(is_right), "numbers": len(numbers)}


def brevity(rows: list[dict[str, Any]], responses: list[str], limit: int = 40) -> list[float]:
    """Return 1 for an empty response, falling to 0 at ``limit`` characters."""
    return [max(0.0, 1.0 - len(response) / limit) for response in responses]


async def checked_elsewhere(row: dict[str, Any], response: str, delay: float = 0.01) -> float:
    """Return what ``exact_answer`` does after a wait, as a request to a sandbox or a service would take."""
    await asyncio.sleep(delay)
    return exact_answer(row, response)["score"]
