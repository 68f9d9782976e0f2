"""What a step of a recipe is. Torch-free.

A step's settings are a ``StepConfig`` with a ``type``; ``start`` makes the step itself, importing what it needs. A
``RowStep`` looks at rows one by one and may run in several processes at once; a ``TableStep`` sketches rows one by one
(so too) and then decides over the sketches of all rows, in one process. Neither ever has all rows in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from align.config.base import Config
from align.data.rows import Dropped, Row


@dataclass(frozen=True)
class StepContext:
    """What a step may know of the build it is part of. Picklable, so that worker processes can start steps too."""

    kind: str
    """The recipe's kind."""
    seed: int
    """The recipe's seed; the same in every process."""
    base: Path
    """Where relative paths start."""
    work: Path
    """A folder of this step's own, kept between attempts of the same build."""
    device: str = "auto"
    """For steps that run models."""
    inputs: tuple[Path, ...] = ()
    """Folders of the artifacts that the data stage was given, in order."""


class StepConfig(Config):
    """Base of the settings of a step, which also has a ``type`` and a method ``start(context)``.

    It may have ``identities(base) -> dict[str, str]``: digests of what it reads beside the rows.
    """

    decides: ClassVar[bool] = False
    """Whether ``start`` gives a ``TableStep``, rather than a ``RowStep``."""
    alone: ClassVar[bool] = False
    """Whether it must not run in several processes at once, because it runs a model on all cores or on a GPU."""


class RowStep(Protocol):
    """Looks at rows one by one."""

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """One result for each row, which depends on that row alone.

        The row (changed or not; make a new dict of a changed one, and keep keys that begin with ``_``), ``Dropped``, or
        a list of rows that take its place.
        """
        ...


class TableStep(Protocol):
    """Decides over all rows at once, from a few numbers about each."""

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Named arrays whose first axis is the rows'; each row's depends on that row alone."""
        ...

    def decide(self, table: Table) -> Verdict:
        """What becomes of each row. Deterministic."""
        ...


@dataclass(frozen=True)
class Table:
    """The sketches of all N rows, in order."""

    columns: dict[str, np.ndarray]
    alive: np.ndarray
    """(N,) bool: False for rows that an earlier step of the same pass dropped; whatever is decided on them is moot."""
    source: np.ndarray
    """(N,) int32, index into ``sources``."""
    sources: list[str]
    row: Callable[[int], Row]
    """Reads one row back from disk: slow, for a few examples."""
    many: Callable[[np.ndarray], Iterable[Row]] | None = None
    """Reads the rows with these numbers, which ascend, in one pass over the disk; :meth:`rows` uses it."""

    def __len__(self) -> int:
        return len(self.alive)

    def rows(self, places: np.ndarray) -> Iterable[Row]:
        """Rows by number, ascending."""
        return map(self.row, places.tolist()) if self.many is None else self.many(places)


@dataclass
class Verdict:
    """``code`` (N,) int32: -1 keeps a row, another number drops it for ``reasons[code]``."""

    code: np.ndarray
    reasons: list[str] = field(default_factory=list)
    instead: np.ndarray | None = None
    """(N,) int64: which row stands for a dropped one (the first of its duplicates), -1 for none."""
    details: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What is particular to a dropped row, by its number; JSON-able. Dropped rows alone have one."""
    times: np.ndarray | None = None
    """(N,) int32: how often a kept row appears from now on; once by default."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Fields that kept rows get."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the ledger: JSON-able, and the same in every run."""


def keep_all(count: int) -> np.ndarray:
    """A ``code`` that keeps ``count`` rows."""
    return np.full(count, -1, dtype=np.int32)
