"""MinHash: small signatures of texts, and clusters of those that share most of their runs of words.

The signature of a text is, for each of K permutations, the least hash among its shingles (runs of words), of which one
byte is kept (b-bit minwise hashing, Li and König 2010, arXiv 0910.3349). Two texts whose sets of shingles have the
Jaccard similarity J agree at a place with probability J + (1 - J) / 256, from which J is estimated with a standard
error of sqrt(J (1 - J) / K). Candidates are pairs that agree in all rows of one of several bands (Broder 1997; Indyk
and Motwani 1998), and each is judged by the whole signature. A signature of 128 bytes is all that is held of a text:
128 MB a million. Left out: the exact Jaccard similarity, which needs the shingles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from align.data.components import first_equal, join
from align.data.ngrams import Block, blocks, constants, mix

PERMUTATIONS = 128
SHINGLE = 3
"""Words in a shingle of a prompt: few, so that a changed word of a short question leaves something in common."""
RECALL = 0.95
"""Chance at least that a pair exactly at the threshold is looked at."""
WINDOW = 32
"""In a bucket of more members each is compared with this many neighbours."""

_PAIRS = 1 << 17
"""Pairs compared at once."""
_CHANCE = 1 / 256
"""How often bytes of different hashes agree."""


def signatures(texts: Sequence[str], *, shingle: int = SHINGLE, permutations: int = PERMUTATIONS) -> np.ndarray:
    """(N, permutations) uint8 of N texts; see :func:`sketch`."""
    return sketch([[text] for text in texts], shingle=shingle, permutations=permutations)[0]


def sketch(
    rows: Sequence[Sequence[str]],
    salts: Sequence[Sequence[int]] | None = None,
    *,
    shingle: int = SHINGLE,
    permutations: int = PERMUTATIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (N, permutations) uint8 and hashes of all words in order (N,) uint64 of N rows.

    A row's text comes in parts, which no shingle spans. ``salts`` has a number for each part: parts of different
    numbers have no shingle in common. A part of fewer words than ``shingle`` is one shingle; rows without any word are
    like each other.
    """
    signature = np.empty((len(rows), permutations), dtype=np.uint8)
    whole = np.empty(len(rows), dtype=np.uint64)
    for block in blocks(rows):
        span = slice(block.first, block.first + len(block.parts) - 1)
        salt = np.zeros(block.parts[-1], dtype=np.uint64)
        if salts is not None:
            salt[:] = [number for row in salts[span] for number in row]
        hashes, offsets = _shingles(block, salt, shingle)
        signature[span] = _least(hashes, offsets[:-1], permutations)
        whole[span] = _whole(block, salt)
    return signature, whole


def _shingles(block: Block, salt: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Shingles of a block's rows, at least one each."""
    hashes, offsets = block.words.ngrams(size)
    if salt.any():
        hashes = mix(hashes ^ np.repeat(_salt(salt), np.diff(offsets)))
    offsets = offsets[block.parts]
    wordless = np.diff(offsets) == 0
    hashes = np.insert(hashes, offsets[:-1][wordless], constants(1, stream=6))
    return hashes, offsets + np.concatenate([[0], np.cumsum(wordless)])


def _salt(numbers: np.ndarray) -> np.ndarray:
    return np.where(numbers == 0, np.uint64(0), constants(int(numbers.max()) + 1, stream=2)[numbers])


def _whole(block: Block, salt: np.ndarray) -> np.ndarray:
    """(rows,) uint64: equal for rows of equal words in equal parts."""
    place = np.arange(len(salt)) - np.repeat(block.parts[:-1], np.diff(block.parts))
    parts = mix(block.words.whole() ^ _salt(salt)) * constants(int(place.max(initial=0)) + 1, stream=3)[place]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(parts)])
    return mix(np.diff(sums[block.parts]))


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and offsets, (count,) uint32: x * factor + offset permutes the 32-bit numbers."""
    return (constants(count, stream=4) >> np.uint64(32)).astype(np.uint32) | np.uint32(1), (
        constants(count, stream=5) >> np.uint64(32)
    ).astype(np.uint32)


def _least(hashes: np.ndarray, begins: np.ndarray, permutations: int) -> np.ndarray:
    """(rows, permutations) uint8: a byte that depends on all bits of each row's least permuted hash.

    Its own low byte would not do: x * factor + offset has the same low byte for two x of the same low byte, whatever
    the permutation.
    """
    high = (hashes >> np.uint64(32)).astype(np.uint32)
    permuted = np.empty_like(high)
    found = np.empty((permutations, len(begins)), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(*_permutations(permutations), strict=True)):
        np.multiply(high, factor, out=permuted)
        permuted += offset
        np.minimum.reduceat(permuted, begins, out=found[number])
    found ^= found >> np.uint32(15)
    found *= np.uint32(0x2C1B3C6D)
    return (found >> np.uint32(24)).astype(np.uint8).T


def estimate(signature: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(P,) float64: estimated Jaccard similarity of pairs of rows; unbiased, so below 0 at times."""
    agreement: np.ndarray = (signature[left] == signature[right]).mean(axis=1)
    return (agreement - _CHANCE) / (1 - _CHANCE)


@dataclass(frozen=True)
class Bands:
    """How signatures are cut up for finding candidates."""

    count: int
    rows: int

    def chance(self, similarity: float) -> float:
        """Chance that a pair of this Jaccard similarity is looked at."""
        agree = similarity + (1 - similarity) * _CHANCE
        return 1 - (1 - agree**self.rows) ** self.count


def choose_bands(threshold: float, permutations: int, recall: float = RECALL) -> Bands:
    """The bands that look at fewest pairs while a pair at ``threshold`` is looked at with a chance of ``recall``."""
    for rows in range(permutations, 1, -1):
        bands = Bands(permutations // rows, rows)
        if bands.chance(threshold) >= recall:
            return bands
    return Bands(permutations, 1)


@dataclass(frozen=True)
class Clusters:
    """Rows that hang together by pairs at or above a threshold."""

    label: np.ndarray
    """(N,) int64: the first row of each row's cluster."""
    compared: int
    """Pairs whose signatures were compared."""
    left_out: int
    """Candidates that were not: pairs of crowded buckets beyond the window."""


def cluster(signature: np.ndarray, exact_keys: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) int64: which row is the first of each row's cluster; see :func:`find_clusters`."""
    return find_clusters(signature, exact_keys, threshold).label


def find_clusters(signature: np.ndarray, exact_keys: np.ndarray, threshold: float, recall: float = RECALL) -> Clusters:
    """Connected components of the N rows whose estimated similarity is at least ``threshold``.

    ``signature`` is (N, K) uint8; rows of equal ``exact_keys`` (N,) are together whatever their signatures. All pairs
    of a bucket (rows that agree in a band) are compared unless it has more than ``WINDOW`` members; then each is
    compared with its ``WINDOW`` neighbours in the order of the next band, so that likely pairs are close. Memory beside
    the arguments: about 100 bytes a row.
    """
    label = first_equal(exact_keys)
    rows = np.flatnonzero(label == np.arange(len(label)))
    bands = choose_bands(threshold, signature.shape[1], recall)
    compared = left_out = 0
    for band in range(bands.count):
        order, bucket = _buckets(signature, rows, bands, band)
        left_out += _beyond_window(bucket)
        joins = []
        for left, right in _neighbours(order, bucket):
            apart = label[left] != label[right]
            left, right = left[apart], right[apart]
            compared += len(left)
            alike = estimate(signature, left, right) >= threshold
            joins.append(np.stack([left[alike], right[alike]]))
        if joins:
            join(label, *np.concatenate(joins, axis=1))
    return Clusters(label, compared, left_out)


def _band_key(signature: np.ndarray, rows: np.ndarray, bands: Bands, band: int) -> np.ndarray:
    """(rows,) uint64: equal where signatures agree in the band."""
    begin = (band % bands.count) * bands.rows
    key = np.zeros(len(rows), dtype=np.uint64)
    for at in range(begin, begin + bands.rows, 8):
        chunk = np.zeros((len(rows), 8), dtype=np.uint8)
        taken = signature[rows, at : min(at + 8, begin + bands.rows)]
        chunk[:, : taken.shape[1]] = taken
        key = mix(key ^ chunk.view("<u8")[:, 0])
    return key


def _buckets(signature: np.ndarray, rows: np.ndarray, bands: Bands, band: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that share a bucket with another, bucket after bucket, and the number of each one's bucket."""
    key = _band_key(signature, rows, bands, band)
    ranked = np.argsort(key, kind="stable")
    same = key[ranked][1:] == key[ranked][:-1]
    shared = np.append(same, False) | np.append(False, same)
    ranked = ranked[shared]
    nearby = _band_key(signature, rows[ranked], bands, band + 1)
    order = np.lexsort((nearby, key[ranked]))
    bucket = np.cumsum(np.diff(key[ranked][order], prepend=np.uint64(0)) != 0)
    return rows[ranked[order]], bucket


def _beyond_window(bucket: np.ndarray) -> int:
    """Pairs of buckets that no window covers."""
    sizes = np.bincount(bucket)
    beyond = np.maximum(sizes[sizes > 0] - 1 - WINDOW, 0)
    return int((beyond * (beyond + 1) // 2).sum())


def _neighbours(order: np.ndarray, bucket: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of one bucket at most ``WINDOW`` places apart, in pieces."""
    for begin in range(0, len(order), _PAIRS):
        for distance in range(1, WINDOW + 1):
            left = np.arange(begin, min(begin + _PAIRS, len(order) - distance))
            left = left[bucket[left] == bucket[left + distance]]
            if not len(left):
                break
            yield order[left], order[left + distance]


def standard_error(threshold: float, permutations: int) -> float:
    """Of an estimated similarity near the threshold."""
    return math.sqrt(threshold * (1 - threshold) / permutations)
