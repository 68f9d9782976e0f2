"""Shingles: the sets of runs of words by which rows are compared, and their exact Jaccard similarity.

A row's text comes in parts, which no shingle spans, each with a mark: parts of different marks have no shingle in
common. A part of fewer words than a shingle is one shingle; rows without any word are like each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.ngrams import Block, blocks, constants, mix

Part = tuple[str, int]
"""A text and its mark."""

_ELEMENTS = 1 << 21
"""Shingles compared at once."""


def shingles(block: Block, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (S,) uint64 of a block's shingles, at least one a row, and (rows + 1,) where each row's begin."""
    hashes, offsets = block.words.ngrams(size)
    if block.marks.any():
        hashes = mix(hashes ^ np.repeat(_salt(block.marks), np.diff(offsets)))
    offsets = offsets[block.parts]
    wordless = np.diff(offsets) == 0
    hashes = np.insert(hashes, offsets[:-1][wordless], constants(1, stream=6))
    return hashes, offsets + np.concatenate([[0], np.cumsum(wordless)])


def whole(block: Block) -> np.ndarray:
    """(rows,) uint64: equal for rows of equal words in equal parts."""
    place = np.arange(len(block.marks)) - np.repeat(block.parts[:-1], np.diff(block.parts))
    parts = mix(block.words.whole() ^ _salt(block.marks))
    parts *= constants(int(place.max(initial=0)) + 1, stream=3)[place]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(parts)])
    return mix(np.diff(sums[block.parts]))


def _salt(marks: np.ndarray) -> np.ndarray:
    return np.where(marks == 0, np.uint64(0), constants(int(marks.max(initial=0)) + 1, stream=2)[marks])


@dataclass(frozen=True)
class Sets:
    """The shingles of some rows, 32 bits of each: of a pair of rows, two coincide by chance once in a million."""

    rows: np.ndarray
    """(R,) int64: the rows' numbers, ascending."""
    hashes: np.ndarray
    """(S,) uint32, row after row."""
    offsets: np.ndarray
    """(R + 1,) int64: where each row's begin."""

    def jaccard(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(P,) float64: exact Jaccard similarity of pairs of rows, given by number."""
        left, right = np.searchsorted(self.rows, left), np.searchsorted(self.rows, right)
        sizes = np.diff(self.offsets)
        both = sizes[left] + sizes[right]
        found = np.empty(len(left))
        ends = np.searchsorted(np.cumsum(both), np.arange(_ELEMENTS, both.sum() + _ELEMENTS, _ELEMENTS), side="right")
        begin = 0
        for end in [*(ends + 1).tolist(), len(left)]:
            span = slice(begin, min(end, len(left)))
            shared = self._shared(left[span], right[span])
            found[span] = shared / (both[span] - shared)
            begin = span.stop
        return found

    def _shared(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(P,) int64: shingles that pairs of places have in common."""
        keys = np.concatenate([self._keys(left), self._keys(right)])
        keys.sort(kind="stable")  # merges the two runs, each of which ascends
        twice = keys[1:][keys[1:] == keys[:-1]]
        found: np.ndarray = np.bincount((twice >> np.uint64(32)).astype(np.int64), minlength=len(left))
        return found

    def _keys(self, places: np.ndarray) -> np.ndarray:
        """Every shingle of the rows at these places, behind the number of the pair."""
        sizes = np.diff(self.offsets)[places]
        shift = np.repeat(self.offsets[places] - (np.cumsum(sizes) - sizes), sizes)
        hashes = self.hashes[np.arange(len(shift)) + shift].astype(np.uint64)
        keys: np.ndarray = np.repeat(np.arange(len(places)), sizes).astype(np.uint64) << np.uint64(32)
        keys |= hashes
        return keys


def read_sets(rows: np.ndarray, parts: Iterable[Sequence[Part]], size: int) -> Sets:
    """The shingles of the rows with these numbers, which ascend, and these parts: about 4 bytes a word."""
    hashes, sizes = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=np.int64)]
    for block in blocks(parts):
        some, offsets = shingles(block, size)
        row = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(offsets))
        keys = np.sort((row << np.uint64(32)) | (some >> np.uint64(32)))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        hashes.append(keys.astype(np.uint32))
        sizes.append(np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(offsets) - 1))
    return Sets(rows, np.concatenate(hashes), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))
