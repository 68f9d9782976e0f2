"""A limit on the rows of each source; the recipe's seed and a row's content decide which ones stay."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from align.config.recipe.step_settings import CapStep
from align.config.validation import suggest
from align.data.rows import Row
from align.data.splits import share
from align.data.steps.base import StepContext, Table, Verdict, keep_all
from align.errors import UserError

OVER = "over the cap of its source"


class Cap:
    """Keeps the rows of each source with the smallest draws."""

    def __init__(self, config: CapStep, context: StepContext) -> None:
        self.config, self.seed = config, context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), a number in [0, 1) for each row."""
        return {"draw": draws(rows, "cap", self.seed)}

    def decide(self, table: Table) -> Verdict:
        """Drop the rows beyond each source's limit. Raises ``UserError`` for a source that does not exist."""
        check_source_names(self.config.sources, table.sources, "cap.sources")
        code = keep_all(len(table))
        for source, name in enumerate(table.sources):
            limit = self.config.sources.get(name, self.config.each)
            places = np.flatnonzero(table.alive & (table.source == source))
            if limit is not None and len(places) > limit:
                # Draws depend on ids and the seed alone, so the same rows stay whatever else is in the recipe.
                order = np.argsort(table.columns["draw"][places], kind="stable")
                code[places[order[limit:]]] = 0
        return Verdict(code, [OVER])


def draws(rows: list[Row], purpose: str, seed: int) -> np.ndarray:
    """Return (N,) numbers in [0, 1) that a row's id, the purpose and the seed decide."""
    return np.array([share(f"{purpose}:{row['id']}", seed) for row in rows], dtype=np.float64)


def check_source_names(names: Iterable[str], sources: list[str], place: str) -> None:
    """Raise ``UserError``, which begins with ``place`` in the recipe, for a source that does not exist."""
    for name in names:
        if name not in sources:
            known = ", ".join(map(repr, sources))
            raise UserError(f"{place}: there is no source '{name}'; there are {known}.{suggest(name, sources)}")
