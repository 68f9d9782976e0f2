"""Interfaces of the steps of a build, and their kinds. Torch-free.

A ``RowStep`` looks at rows one by one and may run in several processes at once. A ``TableStep`` sketches rows one by
one (also in several processes) and then decides over the sketches of all rows in one process. Neither ever has all rows
in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.data.rows import Dropped, Row
from align.registry import Step, load, registered

if TYPE_CHECKING:
    import numpy as np


class RowFilter(ABC):
    """A row step that drops some rows and changes none."""

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """Return each row or ``Dropped``."""
        return [self._judge(row) or row for row in rows]

    @abstractmethod
    def _judge(self, row: Row) -> Dropped | None:
        """Return ``Dropped`` for a row that is dropped."""


class ModelLoaders(Protocol):
    """Access to models, whose package is above this one; ``align.models.pretrained`` implements it. Picklable."""

    def digests(self, folder: Path) -> dict[str, str]:
        """Return digests of a model folder's files by path."""
        ...

    def open_tokenizer(self, name: str, revision: str | None) -> Any:
        """Return the tokenizer of a folder, or of the Hub at a commit."""
        ...

    def make_scorer(self, config: Any, folder: Path, device: str) -> Callable[[list[Row]], list[float]]:
        """Return a function from rows to one number each, NaN if there is none."""
        ...

    def make_embedder(
        self, folder: Path, device: str, max_length: int, batch_size: int
    ) -> Callable[[list[str]], np.ndarray]:
        """Return a function from texts to their embeddings (texts, dimensions)."""
        ...


@dataclass(frozen=True)
class StepContext:
    """Facts about the build that a step is part of. Picklable, so worker processes can also start steps."""

    kind: str
    """Kind of the recipe."""
    seed: int
    """Seed of the recipe; the same in every process."""
    base: Path
    """Folder that relative paths start at."""
    work: Path
    """A folder only of this step, which persists between attempts of the same build."""
    device: str = "auto"
    """Device of steps that run models."""
    inputs: tuple[Path, ...] = ()
    """Folders of the data stage's input artifacts, in order."""
    models: ModelLoaders | None = None
    """Access to models, for steps that need one."""


class RowStep(Protocol):
    """A step that looks at rows one by one."""

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """Return one result for each row, which depends only on that row.

        A result is the row (the same object if nothing changed, else a new dict with the keys that begin with
        ``_``), ``Dropped``, or a list of rows that replace it.
        """
        ...


class TableStep(Protocol):
    """A step that decides over all rows at once, from a few numbers about each."""

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return named arrays whose first axis is the rows; each row's part depends only on that row."""
        ...

    def decide(self, table: Table) -> Verdict:
        """Decide which rows stay. Deterministic."""
        ...


@dataclass(frozen=True)
class Table:
    """The sketches of all N rows, in order."""

    columns: dict[str, np.ndarray]
    alive: np.ndarray
    """(N,) bool: False for rows that an earlier step of the same pass dropped; verdicts on them have no effect."""
    source: np.ndarray
    """(N,) int32, index into ``sources``."""
    sources: list[str]
    row: Callable[[int], Row]
    """Reads one row back from disk: slow, for a few examples."""
    many: Callable[[np.ndarray], Iterable[Row]] | None = None
    """Reads the rows with ascending numbers in one pass over the disk; :meth:`rows` uses it."""

    def __len__(self) -> int:
        return len(self.alive)

    def rows(self, places: np.ndarray) -> Iterable[Row]:
        """Return the rows with these numbers, which ascend."""
        return map(self.row, places.tolist()) if self.many is None else self.many(places)


@dataclass
class Verdict:
    """``code`` (N,) int32: -1 keeps a row, another number drops it for ``reasons[code]``."""

    code: np.ndarray
    reasons: list[str] = field(default_factory=list)
    instead: np.ndarray | None = None
    """(N,) int64: number of the row that stands for a dropped one (the first of its duplicates), -1 for none."""
    details: dict[int, dict[str, Any]] = field(default_factory=dict)
    """JSON-able details of dropped rows, by row number. Only dropped rows have one."""
    times: np.ndarray | None = None
    """(N,) int32: number of copies of a kept row; one by default."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Fields to add to kept rows."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Notes for the ledger: JSON-able, and the same in every run."""


def require_models(models: ModelLoaders | None) -> ModelLoaders:
    """Return the loaders. Raises ``RuntimeError`` if the caller of the build gave none."""
    if models is None:
        raise RuntimeError("a step needs a model: pass align.stages.data.StepModels() as `models`")
    return models


def keep_all(count: int) -> np.ndarray:
    """Return a ``code`` that keeps ``count`` rows."""
    import numpy as np  # late: plans import this module, too

    return np.full(count, -1, dtype=np.int32)


STEPS = registered(Step)
"""Kinds of steps by the ``type`` of their settings."""


def start_step(config: Any, context: StepContext) -> Any:
    """Return the step that ``config`` describes. Raises ``UserError`` if it cannot run."""
    return load(STEPS[config.type].code)(config, context)


def step_identities(config: Any, base: Path, models: ModelLoaders | None = None) -> dict[str, str]:
    """Return digests and versions of everything except the rows that the step reads.

    Raises ``UserError`` for a missing file.
    """
    function = STEPS[config.type].identities
    identities: dict[str, str] = {}
    if function:
        identities = load(function)(config, base, models)
    return identities
