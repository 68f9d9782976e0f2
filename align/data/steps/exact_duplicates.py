"""Rows that say the same, but for case, punctuation and white space: the first stays. Torch-free.

Left out: rows that say nearly the same (``near_duplicates``) or the same in other words (``semantic_duplicates``).
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal

import numpy as np

from align.data.compared import Of, check, key
from align.data.components import first_equal, first_stays
from align.data.rows import Row
from align.data.steps.base import StepConfig, StepContext, Table, Verdict

DUPLICATE = "duplicate of an earlier row"


class ExactDuplicates(StepConfig):
    """Drop every row whose text an earlier row has."""

    type: Literal["exact_duplicates"]
    decides: ClassVar[bool] = True
    of: Of = "row"
    """What must be equal: ``prompt`` (every turn of it), ``reply``, or ``row`` (both; chosen and rejected change
    places only in different rows)."""

    def start(self, context: StepContext) -> _ExactDuplicates:
        """The step itself. Raises ``UserError`` for replies where rows have none."""
        check(self.of, context.kind, self.type)
        return _ExactDuplicates(self.of)


class _ExactDuplicates:
    def __init__(self, of: Of) -> None:
        self.of = of

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """128 bits of each row's text: two different ones of a million are the same with a chance of 1e-27."""
        digests = b"".join(hashlib.blake2b(key(row, self.of).encode(), digest_size=16).digest() for row in rows)
        return {"key": np.frombuffer(digests, dtype="<u8").reshape(len(rows), 2).copy()}

    def decide(self, table: Table) -> Verdict:
        """The first of equal rows stays and is named by the others."""
        places = np.flatnonzero(table.alive)
        keys = table.columns["key"][places].view([("high", "<u8"), ("low", "<u8")])[:, 0]
        code, instead = first_stays(len(table), places, first_equal(keys))
        return Verdict(code, [DUPLICATE], instead)
