"""Rows that say nearly the same: of every cluster the first stays. MinHash, see :mod:`align.data.minhash`. Torch-free.

Left out: rows that say the same in other words (``semantic_duplicates``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from align.data import minhash
from align.data.compared import Of, check, parts
from align.data.components import first_stays
from align.data.rows import Row
from align.data.shingles import Sets, read_sets
from align.data.steps.base import StepConfig, StepContext, Table, Verdict
from align.data.steps.exact_duplicates import DUPLICATE

NEAR = "near-duplicate of an earlier row"
SHINGLES: dict[Of, int] = {"prompt": minhash.SHINGLE, "reply": 5, "row": 5}


class NearDuplicates(StepConfig):
    """Drop every row that hangs together with an earlier one by pairs of like rows."""

    type: Literal["near_duplicates"]
    decides: ClassVar[bool] = True
    of: Of = "row"
    """What is compared: ``prompt`` (all turns but system ones), ``reply``, or ``row`` (both)."""
    threshold: float = Field(0.7, gt=0, le=1)
    """Jaccard similarity of the sets of shingles from which two rows are alike."""
    shingle: int | None = Field(None, ge=1, le=50)
    """Words in a shingle; 3 for prompts, 5 otherwise. One changed word changes as many shingles, so in texts of a dozen
    words larger shingles find only equal ones."""
    permutations: int = Field(minhash.PERMUTATIONS, ge=16, le=1024)
    """Bytes of a signature. More of them leave fewer pairs whose words must be compared."""
    recall: float = Field(minhash.RECALL, gt=0, lt=1)
    """Chance at least that a pair exactly at the threshold is looked at; nearer 1 compares more pairs."""

    def start(self, context: StepContext) -> _NearDuplicates:
        """The step itself. Raises ``UserError`` for replies where rows have none."""
        check(self.of, context.kind, self.type)
        return _NearDuplicates(self)


class _NearDuplicates:
    def __init__(self, config: NearDuplicates) -> None:
        self.config = config
        self.shingle = config.shingle or SHINGLES[config.of]

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """``signature`` (N, permutations) uint8 and ``whole`` (N,) uint64, a hash of all words."""
        compared = [parts(row, self.config.of) for row in rows]
        signature, whole = minhash.sketch(compared, shingle=self.shingle, permutations=self.config.permutations)
        return {"signature": signature, "whole": whole}

    def decide(self, table: Table) -> Verdict:
        """The first row of a cluster stays and is named by the others."""
        places = np.flatnonzero(table.alive)
        whole = table.columns["whole"][places]
        signature = table.columns["signature"]
        if len(places) < len(table):
            signature = signature[places]

        def read(rows: np.ndarray) -> Sets:
            return read_sets(rows, (parts(row, self.config.of) for row in table.rows(places[rows])), self.shingle)

        found = minhash.find_clusters(signature, whole, self.config.threshold, self.config.recall, read)
        code, instead = first_stays(len(table), places, found.label)
        equal = places[whole[found.label] == whole]
        code[equal[code[equal] == 0]] = 1
        return Verdict(code, [NEAR, DUPLICATE], instead, notes=self._notes(found))

    def _notes(self, found: minhash.Clusters) -> dict[str, Any]:
        config = self.config
        bands = minhash.choose_bands(config.threshold, config.permutations, config.recall)
        sizes = np.bincount(found.label)
        sizes = sizes[sizes > 1]
        return {
            "shingle": self.shingle,
            "bands": bands.count,
            "rows_per_band": bands.rows,
            "chance_to_look_at_a_pair_at_the_threshold": round(bands.chance(config.threshold), 4),
            "standard_error": round(minhash.standard_error(config.threshold, config.permutations), 4),
            "pairs_compared": found.compared,
            "pairs_compared_exactly": found.exact,
            "candidates_left_out": found.left_out,
            "clusters": len(sizes),
            "largest_cluster": int(sizes.max(initial=0)),
        }
