"""MinHash: small signatures of texts, and clusters of those that share most of their runs of words.

The signature of a text is, for each of K permutations, the least hash among its shingles (runs of words), of which one
byte is kept (b-bit minwise hashing, Li and König 2010, arXiv 0910.3349). Two texts whose sets of shingles have the
Jaccard similarity J agree at a place with probability J + (1 - J) / 256, from which J is estimated with a standard
error of sqrt(J (1 - J) / K). Candidates are pairs that agree in all rows of one of several bands (Broder 1997; Indyk
and Motwani 1998), and each is judged by the whole signature, and where that is not enough by the shingles themselves. A
signature of 128 bytes is all that is held of a text: 128 MB a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from align.data.components import first_equal, join
from align.data.ngrams import blocks, constants, mix
from align.data.shingles import Part, Sets, shingles, whole

PERMUTATIONS = 128
SHINGLE = 3
"""Words in a shingle of a prompt: few, so that a changed word of a short question leaves something in common."""
RECALL = 0.95
"""Chance at least that a pair exactly at the threshold is looked at."""
WINDOW = 32
"""In a bucket of more members each is compared with this many neighbors on either side."""
SURE, DOUBT = 3, 2.5
"""Standard errors above and below the threshold between which shingles decide rather than the estimate."""

REMEMBERED = 1 << 22
"""Pairs that are kept until shingles decide on them: 32 MiB."""

_PAIRS = 1 << 17
"""Pairs compared at once."""
_CHANCE = 1 / 256
"""How often bytes of different hashes agree."""


def signatures(texts: Sequence[str], *, shingle: int = SHINGLE, permutations: int = PERMUTATIONS) -> np.ndarray:
    """(N, permutations) uint8 of N texts."""
    return sketch([[(text, 0)] for text in texts], shingle=shingle, permutations=permutations)[0]


def sketch(
    rows: Sequence[Sequence[Part]], *, shingle: int = SHINGLE, permutations: int = PERMUTATIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Signatures (N, permutations) uint8 of N rows, and (N,) uint64, equal for rows of equal words in equal parts."""
    signature = np.empty((len(rows), permutations), dtype=np.uint8)
    equal = np.empty(len(rows), dtype=np.uint64)
    for block in blocks(rows):
        span = slice(block.first, block.first + len(block.parts) - 1)
        hashes, offsets = shingles(block, shingle)
        signature[span] = _least(hashes, offsets[:-1], permutations)
        equal[span] = whole(block)
    return signature, equal


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
    exact: int
    """Pairs whose shingles were compared."""
    left_out: int
    """Candidates that were not compared: pairs of crowded buckets beyond the window."""


def find_clusters(
    signature: np.ndarray,
    exact_keys: np.ndarray,
    threshold: float,
    recall: float = RECALL,
    read: Callable[[np.ndarray], Sets] | None = None,
) -> Clusters:
    """Connected components of the N rows whose Jaccard similarity is at least ``threshold``.

    ``signature`` is (N, K) uint8; rows of equal ``exact_keys`` (N,) are together whatever their signatures. All pairs
    of a bucket (rows that agree in a band) are compared unless it has more than ``WINDOW`` members; then each is
    compared with the ``WINDOW`` before and behind it.

    Without ``read`` the estimate decides. Among many rows of one template, whose similarity is a little below the
    threshold, some estimates are above it, and such pairs are enough to make one cluster of all. ``read`` gives the
    shingles of rows by number; with it, they decide wherever the estimate is within some standard errors of the
    threshold. Memory beside the arguments: about 100 bytes a row, and 4 a shingle of rows that are read.
    """
    label = first_equal(exact_keys)
    bands = choose_bands(threshold, signature.shape[1], recall)
    search = _Search(signature, bands, label, np.flatnonzero(label == np.arange(len(label))))
    if read is None:
        search.join(lambda left, right, estimated: estimated >= threshold)
        return Clusters(label, search.compared, 0, search.left_out)
    error = standard_error(min(threshold, 0.95), signature.shape[1])
    sure, possible = threshold + SURE * error, threshold - DOUBT * error
    unsure = np.zeros(len(label), dtype=bool)
    pairs: list[np.ndarray] = []
    count = 0

    def mark(left: np.ndarray, right: np.ndarray, estimated: np.ndarray) -> np.ndarray:
        nonlocal count
        between = (estimated >= possible) & (estimated < sure)
        unsure[left[between]] = unsure[right[between]] = True
        count += int(between.sum())
        if count <= REMEMBERED:
            pairs.append(left[between] * len(label) + right[between])
        return estimated >= sure

    search.join(mark)
    compared, left_out, exact = search.compared, search.left_out, 0
    if count:
        sets = read(np.flatnonzero(unsure))

        def check(left: np.ndarray, right: np.ndarray, estimated: np.ndarray) -> np.ndarray:
            nonlocal exact
            alike = estimated >= sure
            between = np.flatnonzero((estimated >= possible) & ~alike)
            exact += len(between)
            alike[between] = sets.jaccard(left[between], right[between]) >= threshold
            return alike

        if count <= REMEMBERED:
            left, right = np.divmod(np.unique(np.concatenate(pairs)), len(label))  # most were met in several bands
            alike = check(left, right, np.full(len(left), possible))
            join(label, left[alike], right[alike])
        else:
            search.join(check)  # too many to remember: through the buckets again
    return Clusters(label, compared, exact, left_out)


Judge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Given pairs of rows and their estimated similarities, says which are alike."""


class _Search:
    """Looks through the buckets of all bands, band after band, and joins what is alike."""

    def __init__(self, signature: np.ndarray, bands: Bands, label: np.ndarray, rows: np.ndarray) -> None:
        self.signature, self.bands, self.label, self.rows = signature, bands, label, rows
        self.compared = self.left_out = 0

    def join(self, judge: Judge) -> None:
        """Join the pairs that ``judge`` finds alike; pairs that hang together already are passed over."""
        self.compared = self.left_out = 0
        for band in range(self.bands.count):
            order, bucket = self._buckets(band)
            self.left_out += _beyond_window(bucket)
            found = []
            for left, right in _neighbors(order, bucket):
                apart = self.label[left] != self.label[right]
                left, right = left[apart], right[apart]
                self.compared += len(left)
                alike = judge(left, right, estimate(self.signature, left, right))
                found.append(np.stack([left[alike], right[alike]]))
            if found:
                join(self.label, *np.concatenate(found, axis=1))

    def _buckets(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that share a bucket with another, bucket after bucket, and the number of each one's bucket."""
        bits = np.uint64(len(self.rows).bit_length())
        # the key's high bits and the row in one number: sorting numbers is ten times as fast as sorting places by key,
        # and rows that share a bucket only by what is cut off are told apart by their signatures
        packed = np.sort((self._key(band) >> bits << bits) | np.arange(len(self.rows), dtype=np.uint64))
        key = packed >> bits
        same = key[1:] == key[:-1]
        shared = np.append(same, False) | np.append(False, same)
        bucket = np.cumsum(np.diff(key[shared], prepend=key[:1]) != 0)
        return self.rows[(packed[shared] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)], bucket

    def _key(self, band: int) -> np.ndarray:
        """(rows,) uint64: equal where signatures agree in the band."""
        begin = band * self.bands.rows
        end = begin + self.bands.rows
        key = np.zeros(len(self.rows), dtype=np.uint64)
        for at in range(begin, end, 8):
            chunk = np.zeros((len(self.rows), 8), dtype=np.uint8)
            chunk[:, : min(at + 8, end) - at] = self.signature[self.rows, at : min(at + 8, end)]
            key = mix(key ^ chunk.view("<u8")[:, 0])
        return key


def _beyond_window(bucket: np.ndarray) -> int:
    """Pairs of buckets that no window covers."""
    sizes = np.bincount(bucket)
    beyond = np.maximum(sizes[sizes > 0] - 1 - WINDOW, 0)
    return int((beyond * (beyond + 1) // 2).sum())


def _neighbors(order: np.ndarray, bucket: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
