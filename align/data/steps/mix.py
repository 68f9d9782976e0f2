"""Copies of the training rows of each source, by weights, by temperature, or by a number of epochs.

The step comes last in a recipe and does not change the test split: a prompt repeated there would only count twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from align.config.recipe.step_settings import CapStep, MixStep
from align.config.validation import suggest
from align.data.rows import Row
from align.data.steps.base import StepContext, Table, Verdict, keep_all
from align.data.steps.split import share
from align.errors import UserError

NOT_DRAWN = "not drawn for the mixture"


class Mix:
    """Decides how many times each training row appears."""

    def __init__(self, config: MixStep, context: StepContext) -> None:
        self.config, self.seed = config, context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), a number in [0, 1) for each row."""
        return {"draw": draws(rows, "mix", self.seed)}

    def decide(self, table: Table) -> Verdict:
        """Set the copies of each row; rows without one are dropped. Raises ``UserError`` for an unknown source."""
        check_source_names({**(self.config.weights or {}), **(self.config.epochs or {})}, table.sources, "mix")
        train = table.alive & (table.columns["_split"] == "train")
        sizes = np.bincount(table.source[train], minlength=len(table.sources))
        epochs, notes = self._epochs(sizes, table.sources)
        times = np.ones(len(table), dtype=np.int32)
        for source, source_epochs in enumerate(epochs):
            places = np.flatnonzero(train & (table.source == source))
            # 1.3 epochs: every row once, and the 30 % with the smallest draws once more.
            full_epochs = math.floor(source_epochs)
            order = np.argsort(table.columns["draw"][places], kind="stable")
            times[places] = full_epochs
            times[places[order[: round((source_epochs - full_epochs) * len(places))]]] += 1
        code = keep_all(len(table))
        code[times == 0] = 0
        return Verdict(code, [NOT_DRAWN], times=times, notes=notes)

    def _epochs(self, sizes: np.ndarray, sources: list[str]) -> tuple[list[float], dict[str, object]]:
        """Return the epochs of each source, and the ledger's notes on them."""
        config = self.config
        if config.epochs is not None:
            return [config.epochs.get(name, 1.0) for name in sources], {}
        if config.weights is not None:
            shares = np.array([config.weights.get(name, 0.0) for name in sources])
        else:
            # Temperature 1 keeps the sources' sizes, a higher one moves them towards equal shares.
            shares = sizes ** (1 / (config.temperature or 1.0))
        shares = np.where(sizes > 0, shares, 0.0)
        # Rows that each source should give, over the rows it has: that many epochs.
        wanted = (config.rows or int(sizes.sum())) * shares / max(shares.sum(), 1e-300)
        epochs = wanted / np.maximum(sizes, 1)
        limited = [name for name, count in zip(sources, epochs, strict=True) if count > config.max_epochs]
        epochs = np.minimum(epochs, config.max_epochs)
        rounded = {name: round(float(count), 4) for name, count in zip(sources, epochs, strict=True)}
        notes: dict[str, object] = {"epochs": rounded}
        if limited:
            notes["held at max_epochs"] = limited
        return epochs.tolist(), notes


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
                # Draws depend only on ids and the seed, so the same rows stay whatever else is in the recipe.
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
