"""What a family makes: one instruction, one right reply, and how a program checks any reply."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Constraint = dict[str, Any]
Guard = dict[str, Any]

TEXT_GUARD: Guard = {"min_words": 3, "max_words": 60, "max_share": 0.4}
"""For replies in prose; without ``max_words`` one reply stuffed with every topic would pass every guard."""

NUMBER = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


@dataclass(frozen=True)
class Task:
    """One row to be: ``reply`` satisfies every constraint and the guard."""

    prompt: str
    reply: str
    constraints: list[Constraint]
    guard: Guard


Family = Callable[[random.Random], Task]


def ifeval(name: str, **arguments: Any) -> Constraint:
    """A constraint checked by if-verifiable."""
    return {"kind": "ifeval", "id": name, "args": arguments}
