"""A game without tools: ``environment: {class: "examples.guess_the_number:GuessTheNumber", ...}``.

``step`` answers each message of the policy, until the number is guessed or the turns are over. Every turn has a score
of its own: one that guesses closer than the turns before earns a little, the right guess earns 1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

NUMBER = re.compile(r"\d+")


def games(count: int = 200, highest: int = 50, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield games, as records of format ``prompt``, each with a ``secret`` that a recipe keeps."""
    source = random.Random(seed)  # noqa: S311
    for number in range(count):
        yield {
            "prompt": f"Game {number}: guess my number from 1 to {highest}. Answer with a number.",
            "secret": source.randint(1, highest),
        }


class GuessTheNumber:
    """A number from 1 to ``highest``, and hints whether it is higher or lower."""

    def __init__(self, highest: int = 50) -> None:
        """Keep the largest number."""
        self.highest = highest
        self.secret = 0
        self.nearest: int | None = None
        self.turns: list[float] = []

    def reset(self, row: dict[str, Any]) -> None:
        """Begin a game. None: the episode begins with the row's prompt."""
        # Drawn from the row: a game that is played again after a kill has the same secret.
        default_secret = random.Random(f"{row.get('id')}").randint(1, self.highest)  # noqa: S311
        self.secret = int(row.get("secret") or default_secret)
        self.nearest = None
        self.turns = []

    def step(self, message: str) -> str | bool:
        """Answer a guess. True: the game is over."""
        numbers = NUMBER.findall(message)
        if not numbers:
            self.turns.append(-0.1)
            return f"Say a number from 1 to {self.highest}."
        guess = int(numbers[-1][:9])
        if guess == self.secret:
            self.turns.append(1.0)
            return True
        distance = abs(guess - self.secret)
        is_nearer = self.nearest is None or distance < self.nearest
        self.nearest = distance if is_nearer else self.nearest
        self.turns.append(0.1 if is_nearer else 0.0)
        return "Higher." if guess < self.secret else "Lower."

    def score(self) -> dict[str, Any]:
        """Return the score of each turn; their sum is that of the episode."""
        return {"turn": self.turns}
