"""How often the training rows of each source appear: by weights, by temperature, or so many epochs.

It stands last in a recipe and leaves the test split alone: repeated there, a prompt would only count twice.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from align.data.rows import Row
from align.data.steps.base import StepConfig, StepContext, Table, Verdict, keep_all
from align.data.steps.cap import check_names, draws

NOT_DRAWN = "not drawn for the mixture"


class MixConfig(StepConfig):
    """What share of the training rows each source has. One of ``weights``, ``temperature`` and ``epochs``."""

    type: Literal["mix"]
    weights: dict[str, float] | None = None
    """Share of the rows by source; sources that are not named have none. They need not sum to 1."""
    temperature: float | None = Field(None, gt=0)
    """Shares go with size ** (1 / temperature): 1 leaves them as they are, much more makes them equal (arXiv
    1910.10683, 3.5.2)."""
    epochs: dict[str, float] | None = None
    """How often each row of a source appears; 1.5 takes half of the rows a second time; 1 for sources not named."""
    rows: int | None = Field(None, ge=1)
    """Training rows of the mixture, with weights and temperature; as many as there were by default."""
    max_epochs: float = Field(4, ge=1)
    """A row appears this often at most, with weights and temperature; the mixture is smaller then, and the ledger says
    so. Four is where repeats stop being worth fresh rows (arXiv 2305.16264)."""
    decides: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in ("weights", "temperature", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"mix needs one of weights, temperature and epochs; {' and '.join(given) or 'none'} given")
        if self.epochs is not None and self.rows is not None:
            raise ValueError("mix.rows goes with weights or temperature; epochs already say how many rows there are")
        for name, value in {**(self.weights or {}), **(self.epochs or {})}.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"mix.{given[0]}.{name} is {value}; expected a number of at least 0")
        if self.weights is not None and not sum(self.weights.values()):
            raise ValueError("mix.weights are all 0; one at least must be more")
        return self

    def start(self, context: StepContext) -> _Mix:
        """The step itself."""
        return _Mix(self, context.seed)


class _Mix:
    def __init__(self, config: MixConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        return {"draw": draws(rows, "mix", self.seed)}

    def decide(self, table: Table) -> Verdict:
        check_names({**(self.config.weights or {}), **(self.config.epochs or {})}, table.sources, "mix")
        train = table.alive & (table.columns["_split"] == "train")
        sizes = np.bincount(table.source[train], minlength=len(table.sources))
        epochs, notes = self._epochs(sizes, table.sources)
        times = np.ones(len(table), dtype=np.int32)
        for at, often in enumerate(epochs):
            places = np.flatnonzero(train & (table.source == at))
            whole = math.floor(often)
            order = np.argsort(table.columns["draw"][places], kind="stable")
            times[places] = whole
            times[places[order[: round((often - whole) * len(places))]]] += 1
        code = keep_all(len(table))
        code[times == 0] = 0
        return Verdict(code, [NOT_DRAWN], times=times, notes=notes)

    def _epochs(self, sizes: np.ndarray, sources: list[str]) -> tuple[list[float], dict[str, object]]:
        """How often each source's rows appear, and what the ledger says of it."""
        config = self.config
        if config.epochs is not None:
            return [config.epochs.get(name, 1.0) for name in sources], {}
        if config.weights is not None:
            shares = np.array([config.weights.get(name, 0.0) for name in sources])
        else:
            shares = sizes ** (1 / (config.temperature or 1.0))
        shares = np.where(sizes > 0, shares, 0.0)
        wanted = (config.rows or int(sizes.sum())) * shares / max(shares.sum(), 1e-300)
        epochs = wanted / np.maximum(sizes, 1)
        held = [name for name, often in zip(sources, epochs, strict=True) if often > config.max_epochs]
        epochs = np.minimum(epochs, config.max_epochs)
        said = {name: round(float(often), 4) for name, often in zip(sources, epochs, strict=True)}
        notes: dict[str, object] = {"epochs": said}
        if held:
            notes["held at max_epochs"] = held
        return epochs.tolist(), notes
