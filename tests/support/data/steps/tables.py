"""Rows and tables for tests of steps: a step sketches all rows in one or several shards, then decides."""

from pathlib import Path
from typing import Any

import numpy as np

from align.data.rows import Row, assistant, row_id, user
from align.data.steps.step import StepContext, Table, Verdict, start_step
from align.stages.data import StepModels


def row(prompt: str, completion: str | None = "yes", source: int = 0, **more: Any) -> Row:
    fields: Row = {"source": "s", "prompt": [user(prompt)], "checks": "", "_where": prompt, "_source": source, **more}
    if completion is not None:
        fields["completion"] = [assistant(completion)]
    return {**fields, "id": row_id(fields)}


def context(work: Path = Path(), **changes: Any) -> StepContext:
    return StepContext(
        **{"kind": "instructions", "seed": 0, "base": Path(), "work": work, "models": StepModels(), **changes}
    )


def decide(
    config: Any,
    rows: list[Row],
    sources: tuple[str, ...] = ("a", "b"),
    cut: int | None = None,
    alive: list[bool] | None = None,
    columns: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Verdict:
    """The verdict of a table step on rows that are sketched in shards of ``cut`` rows."""
    step = start_step(config, context(**changes))
    size = cut or max(len(rows), 1)
    parts = [step.sketch(rows[start : start + size]) for start in range(0, max(len(rows), 1), size)]
    sketches = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    living = np.array(alive if alive is not None else [True] * len(rows), dtype=bool)
    source = np.array([row["_source"] for row in rows], dtype=np.int32)
    # Another instance decides, since in a build the sketches come from other processes.
    return start_step(config, context(**changes)).decide(
        Table(sketches | (columns or {}), living, source, list(sources), rows.__getitem__)
    )


def kept(verdict: Verdict) -> list[int]:
    """Numbers of the rows that stay."""
    return [int(place) for place in np.flatnonzero(verdict.code < 0)]
