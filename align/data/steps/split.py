"""The last word on every build: equal rows once, at most ``max_rows``, and each prompt on one side.

No prompt, and with ``near_duplicates`` no near-duplicate of one, is in both splits. Not written in recipes: every build
ends with it.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from align.data.components import first_equal, first_stays
from align.data.formats import unusable
from align.data.rows import Dropped, Row, content_digest
from align.data.splits import group, share
from align.data.steps.base import StepConfig, StepContext, Table, Verdict, keep_all

SPLITS = ("train", "test")
PARTS = ("split", *SPLITS)

EQUAL, OVER, LEAKED = "duplicate", "over max_rows", "its question is in the test split"


class Usable(StepConfig):
    """What a trainer can use, looked at again once it is in order."""

    type: Literal["usable"] = "usable"

    def start(self, context: StepContext) -> _Usable:
        """The step itself."""
        return _Usable()


class _Usable:
    def apply(self, rows: list[Row]) -> list[Row | Dropped | list[Row]]:
        return [unusable(row) or row for row in rows]


ID_TAKEN = "_id_taken"
"""Column that marks rows whose id an earlier row has, which says something else: they get another one."""


class Identical(StepConfig):
    """Rows of equal content, the first of which stays; rows that differ keep no common id."""

    type: Literal["identical"] = "identical"
    decides: ClassVar[bool] = True

    def start(self, context: StepContext) -> _Identical:
        """The step itself."""
        return _Identical()


class _Identical:
    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        digests = b"".join(content_digest(row) for row in rows)
        names = b"".join(hashlib.blake2b(row["id"].encode(), digest_size=8).digest() for row in rows)
        return {
            "content": np.frombuffer(digests, dtype="<u8").reshape(len(rows), 2).copy(),
            "id": np.frombuffer(names, dtype="<u8").copy(),
        }

    def decide(self, table: Table) -> Verdict:
        places = np.flatnonzero(table.alive)
        keys = table.columns["content"][places].view([("high", "<u8"), ("low", "<u8")])[:, 0]
        code, instead = first_stays(len(table), places, first_equal(keys))
        left = places[code[places] < 0]
        again = first_equal(table.columns["id"][left]) != np.arange(len(left))
        taken = np.zeros(len(table), dtype=bool)
        taken[left] = again
        return Verdict(code, [EQUAL], instead, columns={ID_TAKEN: taken} if again.any() else {})


class MaxRows(StepConfig):
    """A limit to the rows of the whole build, chosen by the seed."""

    type: Literal["max_rows"] = "max_rows"
    decides: ClassVar[bool] = True
    rows: int

    def start(self, context: StepContext) -> _MaxRows:
        """The step itself."""
        return _MaxRows(self.rows, context.seed)


class _MaxRows:
    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        return {"draw": np.array([share(row["id"], self.seed) for row in rows], dtype=np.float64)}

    def decide(self, table: Table) -> Verdict:
        places = np.flatnonzero(table.alive)
        order = np.argsort(table.columns["draw"][places], kind="stable")
        code = keep_all(len(table))
        code[places[order[self.rows :]]] = 0
        return Verdict(code, [OVER])


class Split(StepConfig):
    """Which side each prompt is on."""

    type: Literal["split"] = "split"
    decides: ClassVar[bool] = True
    test_size: float
    near_duplicates: float | None
    parts: tuple[str, ...] = Field(strict=False)
    """Where the rows of each source go."""

    def start(self, context: StepContext) -> _Split:
        """The step itself."""
        return _Split(self, context.seed)


class _Split:
    def __init__(self, config: Split, seed: int) -> None:
        self.config, self.seed = config, seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        groups = [group(row) for row in rows]
        found: dict[str, Any] = {
            "draw": np.array([share(name, self.seed) for name in groups], dtype=np.float64),
            "group": np.array([share(name, 0) for name in groups], dtype=np.float64),
        }
        if self.config.near_duplicates is not None:
            from align.data.minhash import signatures

            found["signature"] = signatures(groups)
        return found

    def decide(self, table: Table) -> Verdict:
        """A group is tested when the draw of its first row's prompt falls below ``test_size``."""
        places = np.flatnonzero(table.alive)
        part = np.array([PARTS.index(name) for name in self.config.parts], dtype=np.int8)[table.source[places]]
        first, label = np.unique(table.columns["group"][places], return_index=True, return_inverse=True)[1:]
        label = first[label]  # of each row, the first row with its prompt
        clusters = len(first)
        if self.config.near_duplicates is not None:
            label = self._hang_together(table, places, label, self.config.near_duplicates)
            clusters = len(np.unique(label))
        tested = self._tested(table.columns["draw"][places][label], label, part == 0)
        in_test = (part == 2) | ((part == 0) & tested)
        leaked = ~in_test & np.isin(label, label[in_test])
        code, side = keep_all(len(table)), np.zeros(len(table), dtype="U5")
        code[places[leaked]] = 0
        side[places] = np.where(in_test, "test", "train")
        return Verdict(code, [LEAKED], columns={"_split": side}, notes={"prompts": len(first), "clusters": clusters})

    def _hang_together(self, table: Table, places: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
        """(M,) of each row, the first row whose prompt hangs together with its own by like prompts."""
        from align.data.minhash import SHINGLE, find_clusters
        from align.data.shingles import Sets, read_sets

        def read(rows: np.ndarray) -> Sets:
            return read_sets(rows, ([(group(row), 0)] for row in table.rows(places[rows])), SHINGLE)

        return find_clusters(table.columns["signature"][places], label, threshold, read=read).label

    def _tested(self, draw: np.ndarray, label: np.ndarray, divided: np.ndarray) -> np.ndarray:
        """(N,) whether each row's group is tested; neither side stays empty where there are two groups to divide."""
        tested = draw < self.config.test_size
        groups, at = np.unique(label[divided], return_index=True)
        if len(groups) > 1:
            draws = draw[divided][at]
            if not (draws < self.config.test_size).any():
                tested |= label == groups[draws.argmin()]
            elif (draws < self.config.test_size).all():
                tested &= label != groups[draws.argmax()]
        return tested
