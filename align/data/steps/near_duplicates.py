"""The ``near_duplicates`` step: rows with nearly the same words; of every cluster the first stays. Torch-free.

MinHash, see :mod:`align.data.minhash`. Not covered: rows with the same meaning (``semantic_duplicates``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from align.config.recipe.step_settings import ComparedPart, NearDuplicatesStep
from align.data import minhash
from align.data.duplicates import check_part, compared_texts, first_stays
from align.data.rows import Row
from align.data.shingles import Sets, read_sets
from align.data.steps.base import StepContext, Table, Verdict
from align.data.steps.exact_duplicates import DUPLICATE

NEAR = "near-duplicate of an earlier row"
SHINGLES: dict[ComparedPart, int] = {"prompt": minhash.SHINGLE, "reply": 5, "row": 5}


class NearDuplicates:
    """Drops rows similar to an earlier row. Raises ``UserError`` for replies where rows have none."""

    def __init__(self, config: NearDuplicatesStep, context: StepContext) -> None:
        check_part(config.of, context.kind, config.type)
        self.config = config
        self.shingle = config.shingle or SHINGLES[config.of]

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``signature`` (N, permutations) uint8 and ``whole`` (N,) uint64, a hash of all words."""
        texts = [compared_texts(row, self.config.of) for row in rows]
        signature, text_hash = minhash.sketch(texts, shingle=self.shingle, permutations=self.config.permutations)
        return {"signature": signature, "whole": text_hash}

    def decide(self, table: Table) -> Verdict:
        """Keep the first row of each cluster; the dropped ones name it."""
        places = np.flatnonzero(table.alive)
        text_hash = table.columns["whole"][places]
        # Signatures are the largest column, so they are copied only where some rows are gone.
        signature = table.columns["signature"]
        if len(places) < len(table):
            signature = signature[places]

        def read(rows: np.ndarray) -> Sets:
            # The search numbers the rows that are left. ``places`` turns these into numbers of the table.
            texts = (compared_texts(row, self.config.of) for row in table.rows(places[rows]))
            return read_sets(rows, texts, self.shingle)

        clusters = minhash.find_clusters(signature, text_hash, self.config.threshold, self.config.recall, read)
        code, instead = first_stays(len(table), places, clusters.label)
        # Rows with all the words of their cluster's first row get their own reason.
        equal = places[text_hash[clusters.label] == text_hash]
        code[equal[code[equal] == 0]] = 1
        return Verdict(code, [NEAR, DUPLICATE], instead, notes=self._notes(clusters))

    def _notes(self, clusters: minhash.Clusters) -> dict[str, Any]:
        config = self.config
        bands = minhash.choose_bands(config.threshold, config.permutations, config.recall)
        sizes = np.bincount(clusters.label)
        sizes = sizes[sizes > 1]
        return {
            "shingle": self.shingle,
            "bands": bands.count,
            "rows_per_band": bands.rows,
            "chance_to_look_at_a_pair_at_the_threshold": round(bands.chance(config.threshold), 4),
            "standard_error": round(minhash.standard_error(config.threshold, config.permutations), 4),
            "pairs_compared": clusters.compared,
            "pairs_compared_exactly": clusters.exact,
            "candidates_left_out": clusters.left_out,
            "clusters": len(sizes),
            "largest_cluster": int(sizes.max(initial=0)),
        }
