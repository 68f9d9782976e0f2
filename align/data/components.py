"""Rows that belong together by pairs, and which one of them stands for the others."""

from __future__ import annotations

import numpy as np


def join(label: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Give rows that pairs connect one label, the least. ``label`` points to the first of each cluster throughout."""
    while True:
        ends = np.sort(np.stack([label[left], label[right]]), axis=0)
        apart = ends[0] != ends[1]
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(label, ends[1][apart], ends[0][apart])
        while not np.array_equal(farther := label[label], label):
            label[:] = farther


def first_equal(keys: np.ndarray) -> np.ndarray:
    """(N,) int64: the first row with the key of each row."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    found: np.ndarray = first[inverse.reshape(-1)].astype(np.int64)
    return found


def first_stays(count: int, places: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``code`` and ``instead`` of a verdict on ``count`` rows.

    ``places`` (M,) are the rows that were looked at, ``label`` (M,) which of those stands for each: the others are
    dropped for reason 0.
    """
    again = label != np.arange(len(places))
    code, instead = np.full(count, -1, dtype=np.int32), np.full(count, -1, dtype=np.int64)
    code[places[again]], instead[places[again]] = 0, places[label[again]]
    return code, instead
