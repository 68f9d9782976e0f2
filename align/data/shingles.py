"""Shingles: the sets of n-grams of words that rows are compared by, and their exact Jaccard similarity.

A row's text is a list of parts, which no shingle spans, each with a mark: parts of different marks share no shingle. A
part with fewer words than a shingle is one shingle; rows without any word are similar to each other.
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
    """Return hashes (S,) uint64 of a block's shingles, at least one a row, and the first of each row (rows + 1,)."""
    hashes, offsets = block.words.ngrams(size)
    # Marked parts are salted, so that a rejected answer never matches an equal chosen one.
    if block.marks.any():
        hashes = mix(hashes ^ np.repeat(_salt(block.marks), np.diff(offsets)))
    offsets = offsets[block.parts]  # of rows instead of parts
    wordless = np.diff(offsets) == 0
    # Rows without words get one fixed shingle, so that every row has one.
    hashes = np.insert(hashes, offsets[:-1][wordless], constants(1, stream=6))
    # Each inserted shingle moves the rows behind it by one place.
    return hashes, offsets + np.concatenate([[0], np.cumsum(wordless)])


def hash_rows(block: Block) -> np.ndarray:
    """Return (rows,) uint64, equal for rows of equal words in equal parts."""
    # A polynomial of the parts' hashes, so that their order counts.
    place = np.arange(len(block.marks)) - np.repeat(block.parts[:-1], np.diff(block.parts))
    parts = mix(block.words.hash_texts() ^ _salt(block.marks))
    parts *= constants(int(place.max(initial=0)) + 1, stream=3)[place]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(parts)])
    return mix(np.diff(sums[block.parts]))


def _salt(marks: np.ndarray) -> np.ndarray:
    return np.where(marks == 0, np.uint64(0), constants(int(marks.max(initial=0)) + 1, stream=2)[marks])


@dataclass(frozen=True)
class Sets:
    """The shingles of some rows, 32 bits of each: one in a million pairs of rows has an accidental match."""

    rows: np.ndarray
    """(R,) int64: numbers of the rows, ascending."""
    hashes: np.ndarray
    """(S,) uint32, row after row."""
    offsets: np.ndarray
    """(R + 1,) int64: first shingle of each row."""

    def jaccard(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return (P,) float64: the exact Jaccard similarity of pairs of rows, given by number (P,)."""
        left = np.searchsorted(self.rows, left)
        right = np.searchsorted(self.rows, right)
        sizes = np.diff(self.offsets)
        both = sizes[left] + sizes[right]
        similarity = np.empty(len(left))
        # Pairs are compared in groups with about ``_ELEMENTS`` shingles each.
        ends = np.searchsorted(np.cumsum(both), np.arange(_ELEMENTS, both.sum() + _ELEMENTS, _ELEMENTS), side="right")
        begin = 0
        for end in [*(ends + 1).tolist(), len(left)]:
            span = slice(begin, min(end, len(left)))
            shared = self._shared(left[span], right[span])
            similarity[span] = shared / (both[span] - shared)
            begin = span.stop
        return similarity

    def _shared(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return (P,) int64: the number of common shingles of pairs of places."""
        # A shingle that both rows of a pair have occurs twice under the pair's number.
        keys = np.concatenate([self._keys(left), self._keys(right)])
        keys.sort(kind="stable")  # merges the two runs, each of which ascends
        common = keys[1:][keys[1:] == keys[:-1]]
        counts: np.ndarray = np.bincount((common >> np.uint64(32)).astype(np.int64), minlength=len(left))
        return counts

    def _keys(self, places: np.ndarray) -> np.ndarray:
        """Return every shingle of the rows at these places, below the number of the pair in the high 32 bits."""
        sizes = np.diff(self.offsets)[places]
        # Number the shingles of all places through, then shift each place's numbers to where its shingles lie.
        shift = np.repeat(self.offsets[places] - (np.cumsum(sizes) - sizes), sizes)
        hashes = self.hashes[np.arange(len(shift)) + shift].astype(np.uint64)
        keys: np.ndarray = np.repeat(np.arange(len(places)), sizes).astype(np.uint64) << np.uint64(32)
        keys |= hashes
        return keys


def read_sets(rows: np.ndarray, parts: Iterable[Sequence[Part]], size: int) -> Sets:
    """Return the shingles of rows with ascending numbers and these parts; about 4 bytes a word."""
    hashes = [np.zeros(0, dtype=np.uint32)]
    sizes = [np.zeros(0, dtype=np.int64)]
    for block in blocks(parts):
        block_hashes, offsets = shingles(block, size)
        row = np.repeat(np.arange(len(offsets) - 1, dtype=np.uint64), np.diff(offsets))
        # Row number in the high bits, shingle in the low ones: one sort groups rows and orders their shingles.
        keys = np.sort((row << np.uint64(32)) | (block_hashes >> np.uint64(32)))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]  # each shingle of a row once
        hashes.append(keys.astype(np.uint32))
        sizes.append(np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(offsets) - 1))
    return Sets(rows, np.concatenate(hashes), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))
