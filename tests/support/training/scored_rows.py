"""Rows with scores, labels or marked steps, for the tests of reward models that learn from single answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.data.rows import assistant, user, write_rows
from align.store.artifacts import Artifact, Kind

SEPARATOR = "\n"


def scored(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Instructions whose score is the number of exclamation marks in the answer, away from 0 and wider than 1."""
    return [
        {
            "id": str(index),
            "source": "test",
            "checks": "",
            "prompt": [user(f"Rate {index}")],
            "completion": [assistant("x" + "!" * (index % 4) + "." * (index % 3))],
            "score": 10.0 + 4 * (index % 4),
        }
        for index in range(start, start + count)
    ]


def labeled(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Unpaired rows: an answer is wanted when it says yes."""
    return [
        {
            "id": str(index),
            "source": "test",
            "checks": "",
            "prompt": [user(f"Well {index}?")],
            "completion": [assistant("yes" if index % 2 else "no")],
            "label": bool(index % 2),
        }
        for index in range(start, start + count)
    ]


def stepwise(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Solutions of three steps; a step is right when it says ``ok``. A third of them have no wrong one."""
    rows = []
    for index in range(start, start + count):
        wrong = (index % 3) - 1  # none, the first or the second
        steps = [{"content": f"{number} {'no' if number == wrong else 'ok'}", "label": float(number != wrong)}
                 for number in range(3)]  # fmt: skip
        rows.append(
            {
                "id": str(index),
                "source": "test",
                "checks": "",
                "prompt": [user(f"Solve\n{index}")],
                "completion": [assistant(SEPARATOR.join(str(step["content"]) for step in steps))],
                "label": wrong < 0,
                "steps": steps,
            }
        )
    return rows


def artifact(folder: Path, kind: Kind, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.parquet", train)
    write_rows(folder / "test.parquet", test)
    return Artifact("data", kind, folder, {})
