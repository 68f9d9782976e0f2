"""The reward: change it to what your answers are worth."""

import re
from typing import Any


def right_number(row: dict[str, Any], response: str) -> float:
    """Return 1 where the last number of the response is the row's ``answer``, else 0."""
    numbers = re.findall(r"-?\d+", response)
    return float(bool(numbers) and numbers[-1] == row["answer"])
