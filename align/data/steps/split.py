"""The last steps of every build: drop equal rows, apply ``max_rows``, and put each prompt into one split.

No prompt, and with ``near_duplicates`` no near-duplicate of one, is in both splits. Recipes do not write these steps:
every build ends with them.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
from pydantic import Field

from align.config.base import Config
from align.data.duplicates import first_equal, first_stays
from align.data.formats import find_fault
from align.data.rows import Dropped, Row, content_digest
from align.data.splits import group, share
from align.data.steps.base import StepContext, Table, Verdict, keep_all

SPLITS = ("train", "test")
PARTS = ("split", *SPLITS)

EQUAL, OVER, LEAKED = "duplicate", "over max_rows", "its question is in the test split"

LARGEST = "largest_cluster"
"""Note of the ledger: prompts of the largest cluster of near-duplicates."""
ID_TAKEN = "_id_taken"
"""Column that marks rows whose id an earlier row with other content has: they get another id."""


class UsableStep(Config):
    """Settings of the check for trainable rows, which has none."""

    type: Literal["usable"] = "usable"


class Usable:
    """Drops rows that no trainer can use, after ``normalize`` has mended what it can."""

    def __init__(self, config: UsableStep, context: StepContext) -> None:
        pass

    def apply(self, rows: list[Row]) -> list[Row | Dropped | list[Row]]:
        """Return each row, or the reason to drop it."""
        return [find_fault(row) or row for row in rows]


class IdenticalStep(Config):
    """Settings of the search for equal rows, which has none."""

    type: Literal["identical"] = "identical"


class Identical:
    """Keeps the first of the rows of equal content; rows that differ keep no common id."""

    def __init__(self, config: IdenticalStep, context: StepContext) -> None:
        pass

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``content`` (N, 2) uint64, a digest of the row, and ``id`` (N,) uint64, one of its id."""
        # Two 64-bit numbers per row: enough to tell a billion rows apart.
        digests = b"".join(content_digest(row) for row in rows)
        names = b"".join(hashlib.blake2b(row["id"].encode(), digest_size=8).digest() for row in rows)
        return {
            "content": np.frombuffer(digests, dtype="<u8").reshape(len(rows), 2).copy(),
            "id": np.frombuffer(names, dtype="<u8").copy(),
        }

    def decide(self, table: Table) -> Verdict:
        """Drop later rows of equal content, and mark rows whose id is taken."""
        places = np.flatnonzero(table.alive)
        keys = table.columns["content"][places].view([("high", "<u8"), ("low", "<u8")])[:, 0]
        code, instead = first_stays(len(table), places, first_equal(keys))
        left = places[code[places] < 0]
        # Among the rows that stay, a second one with an id gets a new id from its content.
        has_taken_id = first_equal(table.columns["id"][left]) != np.arange(len(left))
        id_taken = np.zeros(len(table), dtype=bool)
        id_taken[left] = has_taken_id
        return Verdict(code, [EQUAL], instead, columns={ID_TAKEN: id_taken} if has_taken_id.any() else {})


class MaxRowsStep(Config):
    """Settings of the limit on the rows of a build."""

    type: Literal["max_rows"] = "max_rows"
    rows: int


class MaxRows:
    """Keeps the rows with the smallest draws."""

    def __init__(self, config: MaxRowsStep, context: StepContext) -> None:
        self.rows, self.seed = config.rows, context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), a number in [0, 1) for each row."""
        return {"draw": np.array([share(row["id"], self.seed) for row in rows], dtype=np.float64)}

    def decide(self, table: Table) -> Verdict:
        """Drop the rows beyond the limit."""
        places = np.flatnonzero(table.alive)
        # Draws depend on ids alone: the same rows stay whatever the order of files or shards.
        order = np.argsort(table.columns["draw"][places], kind="stable")
        code = keep_all(len(table))
        code[places[order[self.rows :]]] = 0
        return Verdict(code, [OVER])


class SplitStep(Config):
    """Settings of the split into training and test rows."""

    type: Literal["split"] = "split"
    test_size: float
    near_duplicates: float | None
    parts: tuple[str, ...] = Field(strict=False)
    """Part that the rows of each source go to."""


class Split:
    """Puts each prompt into one split, together with its near-duplicates."""

    def __init__(self, config: SplitStep, context: StepContext) -> None:
        self.config, self.seed = config, context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), ``group`` (N,), a hash of the first question, and perhaps its ``signature``."""
        groups = [group(row) for row in rows]
        columns: dict[str, Any] = {
            "draw": np.array([share(name, self.seed) for name in groups], dtype=np.float64),
            "group": np.array([share(name, 0) for name in groups], dtype=np.float64),
        }
        # Questions alone are compared: a reply that differs must not put one question on both sides.
        if self.config.near_duplicates is not None:
            from align.data.minhash import signatures

            columns["signature"] = signatures(groups)
        return columns

    def decide(self, table: Table) -> Verdict:
        """Assign the splits: a group goes to test when the draw of its first row's prompt is below ``test_size``."""
        places = np.flatnonzero(table.alive)
        part = np.array([PARTS.index(name) for name in self.config.parts], dtype=np.int8)[table.source[places]]
        first, label = np.unique(table.columns["group"][places], return_index=True, return_inverse=True)[1:]
        label = first[label]  # of each row, the first row with its prompt
        notes = {"prompts": len(first), "clusters": len(first)}
        # Join groups of similar prompts; the first row of a cluster draws for all of them.
        if self.config.near_duplicates is not None and len(places):
            label = self._cluster(table, places, label, self.config.near_duplicates)
            # ``first`` has one row for each prompt, so this counts the prompts of each cluster.
            prompts_of_cluster = np.unique(label[first], return_counts=True)[1]
            notes |= {"clusters": len(prompts_of_cluster), LARGEST: int(prompts_of_cluster.max())}
        # All rows of a cluster use the draw of its first row, so they fall on the same side.
        tested = self._draw_test_rows(table.columns["draw"][places][label], label, part == 0)
        # Sources with `part: train` or `part: test` go where they say; a training row whose question a test row has
        # is dropped.
        in_test = (part == 2) | ((part == 0) & tested)
        leaked = ~in_test & np.isin(label, label[in_test])
        code = keep_all(len(table))
        code[places[leaked]] = 0
        side = np.zeros(len(table), dtype="U5")
        side[places] = np.where(in_test, "test", "train")
        return Verdict(code, [LEAKED], columns={"_split": side}, notes=notes)

    def _cluster(self, table: Table, places: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
        """Return (M,) for each row the first row of its cluster of similar prompts."""
        from align.data.minhash import SHINGLE, find_clusters
        from align.data.shingles import Sets, read_sets

        def read(rows: np.ndarray) -> Sets:
            return read_sets(rows, ([(group(row), 0)] for row in table.rows(places[rows])), SHINGLE)

        return find_clusters(table.columns["signature"][places], label, threshold, read=read).label

    def _draw_test_rows(self, draw: np.ndarray, label: np.ndarray, divided: np.ndarray) -> np.ndarray:
        """Return (M,) bool, True for test rows; no split stays empty where there are two groups to divide."""
        tested = draw < self.config.test_size
        if self.config.test_size in (0, 1):
            return tested  # one split is empty on purpose
        # Small datasets may draw an empty split: move the group nearest to the other side.
        groups, places = np.unique(label[divided], return_index=True)
        if len(groups) > 1:
            group_draws = draw[divided][places]
            if not (group_draws < self.config.test_size).any():
                tested |= label == groups[group_draws.argmin()]
            elif (group_draws < self.config.test_size).all():
                tested &= label != groups[group_draws.argmax()]
        return tested
