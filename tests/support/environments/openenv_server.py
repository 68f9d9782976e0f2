"""A server of OpenEnv, of the real kind, with an environment of our own: ``python -m ... KIND PORT CAPACITY``."""

from __future__ import annotations

import random
import sys
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import Action, Environment, Observation, State, create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation


class Guess(Action):
    guess: str


class Move(Action):
    """Move on a line."""

    steps: int
    backwards: bool = False


class Said(Observation):
    text: str


class GuessingGame(Environment[Guess, Said, State]):
    """A secret digit, drawn from the seed of the reset."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self._secret = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, highest: int = 9, **options: Any) -> Said:
        self._secret = random.Random(seed).randint(1, highest)
        return Said(text=f"Guess a number up to {highest}.")

    def step(self, action: Guess, timeout_s: float | None = None, **options: Any) -> Said:
        if action.guess == "all":
            return Said(text="Hm.", reward=sys.float_info.max)
        if not action.guess.isdigit():
            raise ValueError(f"{action.guess} is no number")
        guess = int(action.guess)
        if guess == self._secret:
            return Said(text="Right.", reward=1.0, done=True)
        return Said(text="Higher." if guess < self._secret else "Lower.", reward=-0.1)

    @property
    def state(self) -> State:
        return self._state


class Line(GuessingGame):
    """A place on a line, which is left at 3."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Said:
        self._secret = 0
        return Said(text="You are at 0. Go to 3.")

    def step(self, action: Move, timeout_s: float | None = None, **options: Any) -> Said:  # type: ignore[override]
        self._secret += -action.steps if action.backwards else action.steps
        return Said(text=f"You are at {self._secret}.", reward=0.5, done=self._secret == 3)


class Sums(MCPEnvironment):
    """A tool that adds."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("sums")

        @server.tool
        def add(first: int, second: int) -> int:
            """Add two numbers."""
            if first < 0:
                raise ValueError("no negative numbers")
            return first + second

        super().__init__(server)
        self._state = State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Observation:
        return Observation()

    def _step_impl(self, action: Action, timeout_s: float | None = None, **options: Any) -> Observation:
        raise ValueError("only tools")

    @property
    def state(self) -> State:
        return self._state


KINDS = {
    "guess": (GuessingGame, Guess, Said),
    "line": (Line, Move, Said),
    "sums": (Sums, CallToolAction, CallToolObservation),
}

if __name__ == "__main__":
    kind, port, capacity = sys.argv[1:]
    application = create_app(*KINDS[kind], max_concurrent_envs=int(capacity))
    uvicorn.run(application, host="127.0.0.1", port=int(port), log_level="warning")
