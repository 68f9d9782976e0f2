"""At most so many rows of a source, chosen by the recipe's seed and each row's content."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from align.config.validation import suggest
from align.data.rows import Row
from align.data.splits import share
from align.data.steps.base import StepConfig, StepContext, Table, Verdict, keep_all
from align.errors import UserError

OVER = "over the cap of its source"


class CapConfig(StepConfig):
    """At most so many rows of each source."""

    type: Literal["cap"]
    each: int | None = Field(None, ge=1)
    """Rows of every source that ``sources`` does not name."""
    sources: dict[str, int] = Field({})
    """Rows of single sources, by name: ``{dolly: 2000}``."""
    decides: ClassVar[bool] = True

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.each is None and not self.sources:
            raise ValueError("cap needs `each` (rows of every source) or `sources` (rows by name)")
        if low := [name for name, rows in self.sources.items() if rows < 1]:
            raise ValueError(f"cap.sources: '{low[0]}' is capped at {self.sources[low[0]]} rows; take the source out")
        return self

    def start(self, context: StepContext) -> _Cap:
        """The step itself."""
        return _Cap(self, context.seed)


class _Cap:
    def __init__(self, config: CapConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        return {"draw": draws(rows, "cap", self.seed)}

    def decide(self, table: Table) -> Verdict:
        check_names(self.config.sources, table.sources, "cap.sources")
        code = keep_all(len(table))
        for at, name in enumerate(table.sources):
            most = self.config.sources.get(name, self.config.each)
            places = np.flatnonzero(table.alive & (table.source == at))
            if most is not None and len(places) > most:
                order = np.argsort(table.columns["draw"][places], kind="stable")
                code[places[order[most:]]] = 0
        return Verdict(code, [OVER])


def draws(rows: list[Row], what: str, seed: int) -> np.ndarray:
    """(N,) numbers in [0, 1): each row's own, by its id, ``what`` they are for, and the seed."""
    return np.array([share(f"{what}:{row['id']}", seed) for row in rows], dtype=np.float64)


def check_names(given: dict[str, float] | dict[str, int], sources: list[str], where: str) -> None:
    """Raise ``UserError`` for a source that does not exist."""
    for name in given:
        if name not in sources:
            known = ", ".join(map(repr, sources))
            raise UserError(f"{where}: there is no source '{name}'; there are {known}.{suggest(name, sources)}")
