"""Rows that a stage and those before it have trained on, for a stage that continues with more data.

Rows are compared by content. With the same rows in the same order a continued stage continues in the middle of its
pass. With other rows, the rows that were never trained on come first; then passes over all rows begin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from align.config.base import Config

FILE = "rows.safetensors"
FACTS = "state.json"
DERIVED = ("ref_", "KL_")
"""Beginnings of a row's fields that follow from models or from other rows, and so are not part of its identity."""


class Order(Protocol):
    """A sampler whose rows follow from the epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class StateFacts(Config):
    """Content of ``state.json``: the position of a kept state in its training."""

    steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps of the run's warm-up, which a continued stage keeps."""
    start: int
    """Position at which the current order of the rows began: 0 unless the stage continued with other rows."""


@dataclass(frozen=True)
class RowHistory:
    """The rows of a finished stage: content digests in order, digests of all rows trained on, and its own start."""

    rows: list[int]
    trained: set[int]
    first: list[int]
    """Indices of rows that came before the passes over all rows, because the stage continued with other rows."""
    start: int

    def save(self, folder: Path) -> None:
        """Write ``rows.safetensors``; ``start`` belongs to ``StateFacts``."""
        lists = {"rows": self.rows, "trained": sorted(self.trained), "first": self.first}
        save_file({name: torch.tensor(values, dtype=torch.int64) for name, values in lists.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, start: int) -> RowHistory:
        """Read the history from ``rows.safetensors``."""
        lists = {name: values.tolist() for name, values in load_file(folder / FILE).items()}
        return cls(lists["rows"], set(lists["trained"]), lists["first"], start)

    def is_same(self, rows: Sequence[int]) -> bool:
        """Return True for rows with these digests in this order."""
        return self.rows == list(rows)

    def untrained(self, rows: Sequence[int]) -> list[int]:
        """Return the indices of the digests of rows that were never trained on."""
        return [index for index, digest in enumerate(rows) if digest not in self.trained]


@dataclass(frozen=True)
class Continuation:
    """Order of the rows from position ``start`` on: the rows ``first``, then passes over all rows."""

    first: list[int]
    start: int


def row_digest(row: Mapping[str, Any]) -> int:
    """Return 64 bits of the digest of a row's content, as a signed number."""
    content = {name: value for name, value in row.items() if name != "row" and not name.startswith(DERIVED)}
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class ContinuedOrder:
    """Sampler over ``order`` that continues as ``continuation`` says; rows of positions before it are placeholders."""

    def __init__(self, order: Order, continuation: Continuation) -> None:
        self.order = order
        self.continuation = continuation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        rows = len(self.order)
        first = self.continuation.first
        cached: dict[int, list[int]] = {}
        for position in range(self.epoch * rows, (self.epoch + 1) * rows):
            offset = position - self.continuation.start
            if offset < 0:
                yield 0  # skipped: another order has passed this position
            elif offset < len(first):
                yield first[offset]
            else:
                # Passes over all rows follow, in the plain order. Only the current pass is held in memory.
                number, index = divmod(offset - len(first), rows)
                if number not in cached:
                    self.order.set_epoch(number)
                    cached = {number: list(self.order)}
                yield cached[number][index]


def passed_rows(order: Order, start: int, stop: int) -> set[int]:
    """Return the rows of the positions ``start`` to ``stop`` of a sampler's endless sequence of epochs."""
    length = len(order)
    passed: set[int] = set()
    # Round the end up: the last epoch may be passed in part.
    for epoch in range(start // length, -(-stop // length)):
        # All rows were passed, so further epochs add none.
        if len(passed) == length:
            break
        order.set_epoch(epoch)
        below = epoch * length
        passed.update(list(order)[max(0, start - below) : stop - below])
    return passed


def digests_of(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the digest of each row."""
    return [row_digest(row) for row in rows]
