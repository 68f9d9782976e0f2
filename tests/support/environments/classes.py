"""Environments that tests name in ``environment:``, of every form that there is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from align.environments.results import EnvironmentFailed, ToolError

Row = dict[str, Any]
CALLS: list[str] = []
"""Names of the tools that were called, in order, over all episodes of a process."""


class Counter:
    """An environment that counts up to a goal."""

    def __init__(self, step_size: int = 1) -> None:
        self.step_size = step_size
        self.goal = self.count = 0

    def reset(self, row: Row) -> str:
        """Begin."""
        self.goal = int(row["goal"])
        return f"Count to {self.goal}."

    def add(self, number: int) -> str:
        """Add a number to the count.

        Args:
            number: What to add.
        """
        CALLS.append("add")
        self.count += number * self.step_size
        return f"The count is {self.count}."

    async def wait_and_add(self, number: int, seconds: float = 0.0) -> int:
        """Add a number after a while.

        Args:
            number: What to add.
            seconds: How long to wait.
        """
        CALLS.append("wait_and_add")
        await asyncio.sleep(seconds)
        self.count += number
        return self.count

    def score(self) -> dict[str, float]:
        """Return 1 for the right count."""
        return {"right": float(self.count == self.goal), "close": -abs(self.goal - self.count) / 10}


class Saved(Counter):
    """A counter that is saved, rather than played again."""

    def state(self) -> Row:
        return {"goal": self.goal, "count": self.count}

    def load(self, state: Row) -> None:
        self.goal, self.count = state["goal"], state["count"]


class Garbled:
    """An environment whose errors have half a character, as those of a server may."""

    def reset(self, row: Row) -> str:
        if row.get("fails"):
            raise EnvironmentFailed("bad \ud83d")
        return "Go on."

    def shout(self) -> str:
        """Shout."""
        raise ToolError("bad \ud83d")

    def score(self) -> float:
        return 0.0


class Troubled:
    """An environment whose tools go wrong in every way."""

    def reset(self, row: Row) -> list[Row]:
        return [{"role": "system", "content": "Break it."}, {"role": "user", "content": str(row.get("goal", ""))}]

    def divide(self, first: float, second: float) -> float:
        """Divide.

        Args:
            first: The dividend.
            second: The divisor.
        """
        return first / second

    def give_up(self) -> str:
        """End the episode."""
        raise EnvironmentFailed("the sandbox is gone")

    def leave(self) -> str:
        """Exit the interpreter."""
        sys.exit(3)

    def hang(self, seconds: float = 3600.0) -> str:
        """Hang.

        Args:
            seconds: How long.
        """
        time.sleep(seconds)
        return "awake"

    async def hang_softly(self) -> str:
        """Hang in an await."""
        await asyncio.sleep(3600)
        return "awake"

    def die(self) -> str:
        """Kill the process."""
        os._exit(11)

    def shout(self, characters: int = 2**20) -> str:
        """Return very much.

        Args:
            characters: How much.
        """
        return "a" * characters

    def odd(self, kind: str) -> Any:
        """Return something else than a text.

        Args:
            kind: What.
        """
        kinds = {"none": None, "list": [1, "ä"], "object": object(), "surrogate": "a\ud800b", "bytes": b"\xff"}
        return kinds[kind]

    def score(self) -> float:
        return 1.0


class Game:
    """An environment without tools that answers each message."""

    def reset(self, row: Row) -> None:
        self.secret = str(row["goal"])
        self.tries = 0

    def step(self, message: str) -> Any:
        self.tries += 1
        if message == self.secret:
            return True
        return f"Not {message}."

    def score(self, response: str) -> dict[str, Any]:
        return {"turn": [0.0] * (self.tries - 1) + [float(response == self.secret)]}


class Odd:
    """An environment that returns what ``row`` says."""

    def reset(self, row: Row) -> Any:
        self.row = row
        return row.get("first")

    def step(self, message: str) -> Any:
        return self.row.get("next")

    def score(self) -> Any:
        return self.row.get("score")


class WithoutReset:
    def resett(self, row: Row) -> str:
        return ""

    def score(self) -> float:
        return 0.0


class WithoutScore:
    def reset(self, row: Row) -> str:
        return ""


class WithoutHint:
    def reset(self, row: Row) -> str:
        return ""

    def look(self, place) -> str:  # type: ignore[no-untyped-def]
        """Look.

        Args:
            place: Where.
        """
        return str(place)

    def score(self) -> float:
        return 0.0


class OddHint(WithoutHint):
    def look(self, place: complex) -> str:
        """Look.

        Args:
            place: Where.
        """
        return str(place)


class WithoutDocstring(WithoutScore):
    def score(self) -> float:
        return 0.0

    def look(self, place: str) -> str:
        return place


class WithoutArgumentDocstring(WithoutHint):
    def look(self, place: str) -> str:
        """Look somewhere."""
        return place


class TakesMany(WithoutHint):
    def look(self, *places: str) -> str:
        """Look at places."""
        return " ".join(places)


class OddScore(WithoutDocstring):
    def look(self) -> str:
        """Look."""
        return ""

    def score(self, anything: str) -> float:
        return 0.0


class HalfSaved(OddScore):
    def score(self) -> float:
        return 0.0

    def state(self) -> Row:
        return {}


class Starter(Troubled):
    """An environment that starts processes."""

    def start(self) -> str:
        """Return the ids of this process and of one that it starts."""
        return f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}"

    def start_session(self) -> str:
        """Return the ids of a process in a session of its own, and of a daemon whose parent has ended."""
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        daemon = subprocess.run(
            ["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True, check=True
        )
        return f"{child.pid} {daemon.stdout}"


class Closing(Odd):
    """An environment that takes ``seconds`` to be made, and leaves a file when it is closed."""

    def __init__(self, folder: str, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        self.folder = Path(folder)

    def close(self) -> None:
        (self.folder / str(self.row["id"])).touch(exist_ok=False)


class Loud(Counter):
    """A counter with a tool that prints without end."""

    def loud(self) -> str:
        """Print two megabytes."""
        print("x" * 2_000_000, flush=True)
        return "said"


class Stuck(Counter):
    """A counter with a tool that hangs."""

    def hang(self) -> str:
        """Hang."""
        time.sleep(3600)
        return ""


class SavedStuck(Stuck, Saved):
    """The same with a state."""


class Clock(Counter):
    """A counter that tells the time."""

    def add(self, number: int) -> str:
        """Tell the time.

        Args:
            number: Nothing.
        """
        return str(time.monotonic_ns())


class OddState(Saved):
    """A counter with a state that JSON cannot hold."""

    def state(self) -> Row:
        return {"goal": {self.goal}}


class Writer:
    """An environment whose tool leaves a trace in the world, and that is saved."""

    def reset(self, row: Row) -> str:
        self.folder, self.turns = row["folder"], 0
        return "Write."

    def append(self, turn: int) -> str:
        """Append a line to a file.

        Args:
            turn: What to write.
        """
        with (Path(self.folder) / "called").open("a") as file:
            file.write(f"{turn}\n")
        self.turns += 1
        time.sleep(0.005)
        return f"{self.turns} turns"

    def score(self) -> float:
        return float(self.turns)

    def state(self) -> Row:
        return {"folder": self.folder, "turns": self.turns}

    def load(self, state: Row) -> None:
        self.folder, self.turns = state["folder"], state["turns"]
