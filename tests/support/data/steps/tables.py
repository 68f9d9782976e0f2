"""Rows and tables for tests of steps: a step sketches all rows in one or several shards, then decides."""

from pathlib import Path
from typing import Any

import numpy as np

from align.data.rows import Row, assistant, row_id, user
from align.data.steps.base import StepContext, Table, Verdict


def row(prompt: str, completion: str | None = "yes", source: int = 0, **fields: Any) -> Row:
    made: Row = {"source": "s", "prompt": [user(prompt)], "checks": "", "_where": prompt, "_source": source, **fields}
    if completion is not None:
        made["completion"] = [assistant(completion)]
    return {**made, "id": row_id(made)}


def context(work: Path = Path(), **changes: Any) -> StepContext:
    return StepContext(**{"kind": "instructions", "seed": 0, "base": Path(), "work": work, **changes})


def decide(
    config: Any,
    rows: list[Row],
    sources: tuple[str, ...] = ("a", "b"),
    cut: int | None = None,
    alive: list[bool] | None = None,
    given: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Verdict:
    """The verdict of a table step on rows that are sketched in shards of ``cut`` rows."""
    step = config.start(context(**changes))
    size = cut or max(len(rows), 1)
    parts = [step.sketch(rows[at : at + size]) for at in range(0, max(len(rows), 1), size)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    living = np.array(alive if alive is not None else [True] * len(rows), dtype=bool)
    source = np.array([made["_source"] for made in rows], dtype=np.int32)
    # a step decides in a process of its own: it must not lean on what it saw while it sketched
    return config.start(context(**changes)).decide(
        Table(columns | (given or {}), living, source, list(sources), rows.__getitem__)
    )


def kept(verdict: Verdict) -> list[int]:
    """Numbers of the rows that stay."""
    return [int(place) for place in np.flatnonzero(verdict.code < 0)]
