"""Texts that mean the same, by the cosine of their embeddings: an exact search in blocks, in bounded memory.

Every row is compared with all earlier ones that stay, so that whatever is dropped is close to the row that stands for
it; the work grows with the square of the rows that stay. Embeddings are kept as 16-bit whole numbers: where a product
of floats is too close to the threshold to be sure of, whole numbers decide, so that every machine and every number of
threads comes to the same verdict. Left out: where embeddings come from (``align.models.embeddings``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SCALE = 32767
"""What stands for 1 in a stored embedding."""
BLOCK, CHUNK = 2048, 8192
"""Rows compared at once, with so many earlier ones: 64 MiB of products."""
_UNSURE = 1e-4
"""More than a product of float32 vectors of length 1 can be wrong by."""


def store(embeddings: np.ndarray) -> np.ndarray:
    """(N, D) int16 of embeddings (N, D): scaled to length 1 and rounded. What has no length is 0, and like nothing."""
    vectors = embeddings.astype(np.float64)
    length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    rounded: np.ndarray = np.rint(unit * SCALE).astype(np.int16)
    return rounded


@dataclass(frozen=True)
class Similar:
    """Which row stands for each, itself where it stays."""

    label: np.ndarray
    """(N,) int64."""
    compared: int
    """Pairs whose cosine was computed."""


def find_similar(vectors: np.ndarray, threshold: float, device: str = "cpu") -> Similar:
    """Go through the rows of :func:`store` in order; each stays unless the cosine with one that stays is ``threshold``.

    The earliest such row stands for it.
    """
    import torch

    count = len(vectors)
    label = np.arange(count)
    compared = 0
    with torch.inference_mode():
        for begin in range(0, count, BLOCK):
            block = _Block(vectors, begin, min(begin + BLOCK, count), threshold, device)
            for at in range(0, begin, CHUNK):
                earlier = np.arange(at, min(at + CHUNK, begin))
                earlier = earlier[label[earlier] == earlier]
                compared += block.compare(label, earlier)
            compared += block.compare_within(label)
    return Similar(label, compared)


class _Block:
    def __init__(self, vectors: np.ndarray, begin: int, end: int, threshold: float, device: str) -> None:
        self.vectors, self.threshold, self.device = vectors, threshold, device
        self.rows = np.arange(begin, end)
        self.floats = self._floats(self.rows)

    def compare(self, label: np.ndarray, earlier: np.ndarray) -> int:
        """Drop the block's rows that are like one of the earlier ones; returns how many pairs were compared."""
        rows = self.rows[label[self.rows] == self.rows]
        if not len(rows) or not len(earlier):
            return 0
        left, right = self._like(rows, earlier)
        some, first = np.unique(left, return_index=True)
        label[rows[some]] = earlier[right[first]]
        return len(rows) * len(earlier)

    def compare_within(self, label: np.ndarray) -> int:
        """Drop the block's rows that are like an earlier one of it that stays; returns how many pairs were compared."""
        rows = self.rows[label[self.rows] == self.rows]
        left, right = self._like(rows, rows)
        before = right < left
        for row, other in zip(left[before].tolist(), right[before].tolist(), strict=True):
            if label[rows[row]] == rows[row] and label[rows[other]] == rows[other]:
                label[rows[row]] = rows[other]
        return len(rows) * (len(rows) - 1) // 2

    def _floats(self, rows: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.vectors[rows]).to(self.device).float() / SCALE

    def _like(self, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in both of the pairs whose cosine reaches the threshold, by row and then by the other."""
        products = self.floats[rows - self.rows[0]] @ self._floats(others).T
        near = products >= self.threshold - _UNSURE  # the only thing that is done to every product
        left, right = (places.cpu().numpy() for places in near.nonzero(as_tuple=True))
        values = products[near].cpu().numpy()
        alike = values >= self.threshold
        for pair in np.flatnonzero(values < self.threshold + _UNSURE):
            one, other = self.vectors[rows[left[pair]]], self.vectors[others[right[pair]]]
            alike[pair] = one.astype(np.int64) @ other.astype(np.int64) >= self.threshold * SCALE * SCALE
        return left[alike], right[alike]
