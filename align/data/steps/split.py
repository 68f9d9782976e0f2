"""Steps that decide by draws, and the last steps of every build: equal rows, ``max_rows``, the split, ``mix``.

No prompt, and with ``near_duplicates`` no near-duplicate of one, is in both splits. Recipes write ``divide``, ``cap``
and ``mix``; every build ends with the others. ``mix`` does not change the test split: a prompt repeated there would
only count twice.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from align.config.base import Config
from align.config.recipe.step_settings import CapStep, DivideStep, MixStep
from align.config.validation import suggest
from align.data.formats import find_fault
from align.data.minhash import first_equal, first_stays
from align.data.rows import Dropped, Row, content_digest, is_text, normalized, prompt_key
from align.data.steps.step import StepContext, Table, Verdict, keep_all
from align.errors import UserError

SPLITS = ("train", "test")
PARTS = ("split", *SPLITS)

EQUAL = "duplicate"
OVER = "over max_rows"
LEAKED = "its question is in the test split"

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
        """Return ``content`` (N, 2) uint64, a digest of the row, and ``id`` (N,) uint64, a digest of its id."""
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
        undecided = places[code[places] < 0]
        # Among the rows that stay, a second row with the same id gets a new id from its content.
        has_taken_id = first_equal(table.columns["id"][undecided]) != np.arange(len(undecided))
        id_taken = np.zeros(len(table), dtype=bool)
        id_taken[undecided] = has_taken_id
        return Verdict(code, [EQUAL], instead, columns={ID_TAKEN: id_taken} if has_taken_id.any() else {})


class MaxRowsStep(Config):
    """Settings of the limit on the rows of a build."""

    type: Literal["max_rows"] = "max_rows"
    rows: int


class MaxRows:
    """Keeps the rows with the smallest draws."""

    def __init__(self, config: MaxRowsStep, context: StepContext) -> None:
        self.rows = config.rows
        self.seed = context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), a number in [0, 1) for each row."""
        return {"draw": np.array([share(row["id"], self.seed) for row in rows], dtype=np.float64)}

    def decide(self, table: Table) -> Verdict:
        """Drop the rows beyond the limit."""
        places = np.flatnonzero(table.alive)
        # Draws depend only on ids: the same rows stay whatever the order of files or shards.
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
        self.config = config
        self.seed = context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), ``group`` (N,), a hash of the first question, and perhaps its ``signature``."""
        groups = [group(row) for row in rows]
        columns: dict[str, Any] = {
            "draw": np.array([share(name, self.seed) for name in groups], dtype=np.float64),
            "group": np.array([share(name, 0) for name in groups], dtype=np.float64),
        }
        # Only questions are compared: a reply that differs must not put one question on both sides.
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
        from align.data.ngrams import Sets, read_sets

        def read(rows: np.ndarray) -> Sets:
            return read_sets(rows, ([(group(row), 0)] for row in table.rows(places[rows])), SHINGLE)

        return find_clusters(table.columns["signature"][places], label, threshold, read=read).label

    def _draw_test_rows(self, draw: np.ndarray, label: np.ndarray, divided: np.ndarray) -> np.ndarray:
        """Return (M,) bool, True for test rows; no split stays empty if there are two groups to divide."""
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


SEPARATORS = ("\n\n", "\n", " ")
"""Texts to cut at, the best first; a cut is in the second half of a piece."""


class Divide:
    """Replaces a long text by rows with its pieces."""

    def __init__(self, config: DivideStep, context: StepContext) -> None:
        self.characters = config.characters

    def apply(self, rows: list[Row]) -> Sequence[Row | list[Row]]:
        """Return each row, or the rows with its pieces."""
        return [self._divide(row) for row in rows]

    def _divide(self, row: Row) -> Row | list[Row]:
        if len(row["text"]) <= self.characters:
            return row
        return [row | {"text": piece} for piece in divide_text(row["text"], self.characters)]


def divide_text(text: str, characters: int) -> list[str]:
    """Return pieces of at most ``characters`` characters, unchanged but for the separator at each cut.

    Indentation stays, so code is code in every piece. Pieces of only white space are dropped.
    """
    pieces = []
    while len(text) > characters:
        cut, width = _find_cut(text, characters)
        pieces.append(text[:cut])
        text = text[cut + width :]
    return [piece for piece in (*pieces, text) if piece.strip()]


def _find_cut(text: str, characters: int) -> tuple[int, int]:
    """Return the place of the best separator and its length; without one, cut after ``characters`` characters."""
    for separator in SEPARATORS:
        # From the middle on, so pieces do not become short. The separator itself may lie behind the limit.
        place = text.rfind(separator, characters // 2, characters + 1)
        if place > 0:
            return place, len(separator)
    return characters, 0


LARGEST_SHARE = 5
"""At most one in this many questions, and rows, of a ``train`` split becomes validation."""


def group(row: Row) -> str:
    """Return the key of rows that must be in the same split: the first user turn, normalized.

    Conversations that grow from one question share it, so splits cut by the full prompt would leak. A plain text
    is a group by itself, as is a prompt without a user's turn.
    """
    if is_text(row):
        return normalized(row["text"])
    users = (normalized(message["content"]) for message in row["prompt"] if message["role"] == "user")
    return next(users, prompt_key(row))


def share(text: str, seed: int | str) -> float:
    """Return a number in [0, 1) that text and seed decide, the same on every machine."""
    # A hash instead of a generator: adding or removing rows changes no other row's number.
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def hold_back(rows: Sequence[Row], most: int) -> tuple[list[Row], list[Row]]:
    """Divide a ``train`` split into training rows and at most ``most`` validation rows.

    Validation rows are full groups, at most a fifth of the groups and of the rows, in an order that only the first
    questions decide: every stage holds back the same rows. If no group is small enough, it is the smallest one. The
    training rows keep their order; there are none if there is a single group.
    """
    keys = [group(row) for row in rows]
    sizes = Counter(keys)
    order = sorted(sizes, key=lambda key: (share(key, "validation"), key))
    validation: set[str] = set()
    # Full groups are held back until the limit, so no question is on both sides.
    room = min(most, len(rows) // LARGEST_SHARE)
    # A group that is too large is passed over, and smaller ones behind it may still fit.
    for key in order[: max(1, len(order) // LARGEST_SHARE)]:
        if sizes[key] <= room:
            validation.add(key)
            room -= sizes[key]
    if order and not validation:
        validation = {min(order, key=lambda key: sizes[key])}
    training_rows = [row for row, key in zip(rows, keys, strict=True) if key not in validation]
    return training_rows, [row for row, key in zip(rows, keys, strict=True) if key in validation]


NOT_DRAWN = "not drawn for the mixture"


class Mix:
    """Decides how many times each training row appears."""

    def __init__(self, config: MixStep, context: StepContext) -> None:
        self.config = config
        self.seed = context.seed

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``draw`` (N,), a number in [0, 1) for each row."""
        return {"draw": draws(rows, "mix", self.seed)}

    def decide(self, table: Table) -> Verdict:
        """Set the copies of each row; rows without copies are dropped. Raises ``UserError`` for an unknown source."""
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
        target_rows = (config.rows or int(sizes.sum())) * shares / max(shares.sum(), 1e-300)
        epochs = target_rows / np.maximum(sizes, 1)
        limited = [name for name, count in zip(sources, epochs, strict=True) if count > config.max_epochs]
        epochs = np.minimum(epochs, config.max_epochs)
        rounded = {name: round(float(count), 4) for name, count in zip(sources, epochs, strict=True)}
        notes: dict[str, object] = {"epochs": rounded}
        if limited:
            notes["held at max_epochs"] = limited
        return epochs.tolist(), notes


OVER_CAP = "over the cap of its source"


class Cap:
    """Keeps the rows of each source with the smallest draws."""

    def __init__(self, config: CapStep, context: StepContext) -> None:
        self.config = config
        self.seed = context.seed

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
        return Verdict(code, [OVER_CAP])


def draws(rows: list[Row], purpose: str, seed: int) -> np.ndarray:
    """Return (N,) numbers in [0, 1) that a row's id, the purpose and the seed decide."""
    return np.array([share(f"{purpose}:{row['id']}", seed) for row in rows], dtype=np.float64)


def check_source_names(names: Iterable[str], sources: list[str], place: str) -> None:
    """Raise ``UserError``, which begins with ``place`` in the recipe, for a source that does not exist."""
    for name in names:
        if name not in sources:
            names = ", ".join(map(repr, sources))
            raise UserError(f"{place}: there is no source '{name}'; there are {names}.{suggest(name, sources)}")
