"""Search for similar texts by the cosine of their embeddings: exact, in blocks, in bounded memory.

Every row is compared with all earlier ones that stay, so that a dropped row is always close to the row that stands for
it; the work grows with the square of the rows that stay. Embeddings are stored as 16-bit integers: where a product of
floats is too close to the threshold to be certain, integers decide, so that every machine and every number of threads
comes to the same verdict. ``align.models.row_scores`` computes the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SCALE = 32767
"""Integer that represents 1 in a stored embedding."""
BLOCK, CHUNK = 2048, 8192
"""Rows compared at once, and earlier rows that they are compared with: 64 MiB of products."""
_ERROR = 1e-4
"""Upper bound of the error of a product of two float32 vectors of length 1."""


def quantize(embeddings: np.ndarray) -> np.ndarray:
    """Return (N, D) int16 of embeddings (N, D): scaled to length 1 and rounded. Zero vectors are similar to nothing."""
    vectors = embeddings.astype(np.float64)
    length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    rounded: np.ndarray = np.rint(unit * SCALE).astype(np.int16)
    return rounded


@dataclass(frozen=True)
class Similar:
    """Result of a search."""

    label: np.ndarray
    """(N,) int64: the row that stands for each row; the row itself where it stays."""
    compared: int
    """Pairs whose cosine was computed."""


def find_similar(vectors: np.ndarray, threshold: float, device: str = "cpu") -> Similar:
    """Compare rows of :func:`quantize` in order; each stays unless its cosine with one that stays is ``threshold``.

    ``vectors`` is (N, D). The earliest such row stands for a dropped one.
    """
    import torch

    count = len(vectors)
    label = np.arange(count)
    compared = 0
    with torch.inference_mode():
        for begin in range(0, count, BLOCK):
            block = _Block(vectors, begin, min(begin + BLOCK, count), threshold, device)
            for chunk in range(0, begin, CHUNK):
                # First against all earlier blocks, then within the block: rows are decided in order.
                earlier = np.arange(chunk, min(chunk + CHUNK, begin))
                earlier = earlier[label[earlier] == earlier]  # only rows that stay
                compared += block.compare(label, earlier)
            compared += block.compare_within(label)
    return Similar(label, compared)


class _Block:
    def __init__(self, vectors: np.ndarray, begin: int, end: int, threshold: float, device: str) -> None:
        self.vectors, self.threshold, self.device = vectors, threshold, device
        self.rows = np.arange(begin, end)
        self.floats = self._floats(self.rows)

    def compare(self, label: np.ndarray, earlier: np.ndarray) -> int:
        """Drop the block's rows that are similar to an earlier one; return the number of pairs compared."""
        # Rows that an earlier chunk has dropped need no further comparison.
        rows = self.rows[label[self.rows] == self.rows]
        if not len(rows) or not len(earlier):
            return 0
        left, right = self._similar_pairs(rows, earlier)
        similar_rows, first = np.unique(left, return_index=True)
        # Pairs come in order, so the first of a row's matches is the earliest row like it.
        label[rows[similar_rows]] = earlier[right[first]]
        return len(rows) * len(earlier)

    def compare_within(self, label: np.ndarray) -> int:
        """Drop rows that are similar to an earlier one of the block that stays; return the number of pairs compared."""
        rows = self.rows[label[self.rows] == self.rows]
        left, right = self._similar_pairs(rows, rows)
        # Each pair once: a row can only be dropped for an earlier one.
        before = right < left
        # In order, since a row only counts as long as it stays itself.
        for row, earlier in zip(left[before].tolist(), right[before].tolist(), strict=True):
            if label[rows[row]] == rows[row] and label[rows[earlier]] == rows[earlier]:
                label[rows[row]] = rows[earlier]
        return len(rows) * (len(rows) - 1) // 2

    def _floats(self, rows: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.vectors[rows]).to(self.device).float() / SCALE

    def _similar_pairs(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in ``rows`` and ``columns`` of the pairs whose cosine reaches the threshold, in order."""
        products = self.floats[rows - self.rows[0]] @ self._floats(columns).T
        near = products >= self.threshold - _ERROR  # the only operation on every product
        left, right = (places.cpu().numpy() for places in near.nonzero(as_tuple=True))
        values = products[near].cpu().numpy()
        similar = values >= self.threshold
        # Integers decide on pairs within the error of the threshold.
        for pair in np.flatnonzero(values < self.threshold + _ERROR):
            first = self.vectors[rows[left[pair]]].astype(np.int64)
            second = self.vectors[columns[right[pair]]].astype(np.int64)
            similar[pair] = first @ second >= self.threshold * SCALE * SCALE
        return left[similar], right[similar]
