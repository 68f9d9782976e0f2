"""The ``exact_duplicates`` step: rows equal but for case, punctuation and white space, of which the first stays.

Not covered: rows with nearly the same words (``near_duplicates``) or the same meaning (``semantic_duplicates``).
Torch-free.
"""

from __future__ import annotations

import hashlib

import numpy as np

from align.config.recipe.step_settings import ExactDuplicatesStep
from align.data.duplicates import check_part, comparison_key, first_equal, first_stays
from align.data.rows import Row
from align.data.steps.base import StepContext, Table, Verdict

DUPLICATE = "duplicate of an earlier row"


class ExactDuplicates:
    """Drops rows whose text equals an earlier row's. Raises ``UserError`` for replies where rows have none."""

    def __init__(self, config: ExactDuplicatesStep, context: StepContext) -> None:
        check_part(config.of, context.kind, config.type)
        self.part = config.of

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``key`` (N, 2) uint64, 128 bits of each row's text.

        Two different texts of a million have the same key with a probability of 1e-27.
        """
        keys = [comparison_key(row, self.part) for row in rows]
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        return {"key": np.frombuffer(digests, dtype="<u8").reshape(len(rows), 2).copy()}

    def decide(self, table: Table) -> Verdict:
        """Keep the first of equal rows; the dropped ones name it."""
        places = np.flatnonzero(table.alive)
        # Both halves of a key as one structured value, which ``np.unique`` can compare.
        keys = table.columns["key"][places].view([("high", "<u8"), ("low", "<u8")])[:, 0]
        code, instead = first_stays(len(table), places, first_equal(keys))
        return Verdict(code, [DUPLICATE], instead)
