"""A task of a family: an instruction, a correct reply, and the checks of any reply."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Constraint = dict[str, Any]
Guard = dict[str, Any]

TEXT_GUARD: Guard = {"min_words": 3, "max_words": 60, "max_share": 0.4}
"""Guard for prose; without ``max_words`` a reply that lists every topic would pass every guard."""

NUMBER = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


@dataclass(frozen=True)
class Task:
    """The contents of a row; ``reply`` satisfies every constraint and the guard."""

    prompt: str
    reply: str
    constraints: list[Constraint]
    guard: Guard


Family = Callable[[random.Random], Task]


def ifeval(name: str, **arguments: Any) -> Constraint:
    """Return a constraint that if-verifiable checks."""
    return {"kind": "ifeval", "id": name, "args": arguments}
