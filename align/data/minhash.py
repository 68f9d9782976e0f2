"""MinHash: small signatures of texts, and clusters of texts that share most of their n-grams of words.

The signature of a text is, for each of K permutations, one byte of the least hash among its shingles (b-bit minwise
hashing, Li and König 2010, arXiv 0910.3349). Two texts whose sets of shingles have the Jaccard similarity J agree at a
place with probability J + (1 - J) / 256, from which J is estimated with a standard error of sqrt(J (1 - J) / K).
Candidates are pairs that agree in all rows of at least one band (Broder 1997; Indyk and Motwani 1998). Each is
decided by the full signature, and where that is too uncertain, by the shingles. Memory is a signature of 128 bytes per
text: 128 MB for a million.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from align.config.recipe.step_settings import ComparedPart
from align.data.ngrams import Part, Sets, blocks, constants, hash_rows, mix, shingles
from align.data.row_texts import is_bad_reply, reply_texts
from align.data.rows import Row, is_text, normalized, prompt_key
from align.errors import UserError

PERMUTATIONS = 128
SHINGLE = 3
"""Words in a shingle of a prompt: few, so short questions with one changed word still share shingles."""
RECALL = 0.95
"""Least probability that a pair exactly at the threshold is compared."""
WINDOW = 32
"""Members of a larger bucket are compared with this many neighbors on either side only."""
SURE = 3
DOUBT = 2.5
"""Standard errors above and below the threshold; between the two, shingles decide instead of the estimate."""

STORED_PAIRS = 1 << 22
"""Uncertain pairs that are stored until shingles decide on them: 32 MiB."""

_PAIRS = 1 << 17
"""Pairs compared at once."""
_CHANCE = 1 / 256
"""Probability that bytes of different hashes agree."""


def signatures(texts: Sequence[str], *, shingle: int = SHINGLE, permutations: int = PERMUTATIONS) -> np.ndarray:
    """Return the signatures (N, permutations) uint8 of N texts."""
    return sketch([[(text, 0)] for text in texts], shingle=shingle, permutations=permutations)[0]


def sketch(
    rows: Sequence[Sequence[Part]], *, shingle: int = SHINGLE, permutations: int = PERMUTATIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Return signatures (N, permutations) uint8 of N rows, and (N,) uint64, equal for equal words in equal parts."""
    signature = np.empty((len(rows), permutations), dtype=np.uint8)
    equal = np.empty(len(rows), dtype=np.uint64)
    for block in blocks(rows):
        # Blocks are independent, so signatures do not depend on how rows are divided among processes.
        span = slice(block.first, block.first + len(block.parts) - 1)
        hashes, offsets = shingles(block, shingle)
        signature[span] = _min_hashes(hashes, offsets[:-1], permutations)
        equal[span] = hash_rows(block)
    return signature, equal


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return odd factors and offsets, (count,) uint32: x * factor + offset permutes the 32-bit numbers."""
    factors = (constants(count, stream=4) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offsets = (constants(count, stream=5) >> np.uint64(32)).astype(np.uint32)
    return factors, offsets


def _min_hashes(hashes: np.ndarray, begins: np.ndarray, permutations: int) -> np.ndarray:
    """Return (rows, permutations) uint8: a byte that depends on all bits of each row's least permuted hash.

    ``begins`` (rows,) is the first hash of each row. The low byte of the least hash itself would not do: two x of the
    same low byte have the same low byte of x * factor + offset under every permutation.
    """
    # Permuting hashes is a multiplication by an odd number; 32 bits are enough, and half the memory traffic.
    high = (hashes >> np.uint64(32)).astype(np.uint32)
    permuted = np.empty_like(high)
    least = np.empty((permutations, len(begins)), dtype=np.uint32)
    for number, (factor, offset) in enumerate(zip(*_permutations(permutations), strict=True)):
        np.multiply(high, factor, out=permuted)
        permuted += offset
        # The least value of every row in one call: two rows share it with probability equal to their similarity.
        np.minimum.reduceat(permuted, begins, out=least[number])
    # Mix the bits, then keep the highest byte.
    least ^= least >> np.uint32(15)
    least *= np.uint32(0x2C1B3C6D)
    return (least >> np.uint32(24)).astype(np.uint8).T


def estimate(signature: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (P,) float64: the estimated Jaccard similarity of pairs of rows (P,); unbiased, so it may be below 0.

    ``signature`` is (N, K) uint8.
    """
    # Subtract the agreement that unequal hashes have by chance, then stretch so 1 stays 1.
    agreement: np.ndarray = (signature[first] == signature[second]).mean(axis=1)
    return (agreement - _CHANCE) / (1 - _CHANCE)


@dataclass(frozen=True)
class Bands:
    """A division of signatures into bands of rows, which select candidates."""

    count: int
    rows: int

    def chance(self, similarity: float) -> float:
        """Return the probability that a pair of this Jaccard similarity is compared."""
        # A band agrees if all of its rows do; a pair is missed only if every band disagrees.
        agree = similarity + (1 - similarity) * _CHANCE
        return 1 - (1 - agree**self.rows) ** self.count


def choose_bands(threshold: float, permutations: int, recall: float = RECALL) -> Bands:
    """Return the bands with the fewest candidates whose probability at ``threshold`` is at least ``recall``."""
    # More rows in a band mean fewer candidates, so try the longest bands first.
    for rows in range(permutations, 1, -1):
        bands = Bands(permutations // rows, rows)
        if bands.chance(threshold) >= recall:
            return bands
    return Bands(permutations, 1)


@dataclass(frozen=True)
class Clusters:
    """Connected components of rows, by pairs at or above a threshold."""

    label: np.ndarray
    """(N,) int64: first row of each row's cluster."""
    compared: int
    """Pairs whose signatures were compared."""
    exact: int
    """Pairs whose shingles were compared."""
    left_out: int
    """Candidates that were not compared: pairs of large buckets beyond the window."""


def find_clusters(
    signature: np.ndarray,
    exact_keys: np.ndarray,
    threshold: float,
    recall: float = RECALL,
    read: Callable[[np.ndarray], Sets] | None = None,
) -> Clusters:
    """Return the connected components of N rows, by pairs whose Jaccard similarity is at least ``threshold``.

    ``signature`` is (N, K) uint8; rows of equal ``exact_keys`` (N,) are always in one component. All pairs of a bucket
    (rows that agree in a band) are compared unless it has more than ``WINDOW`` members; then each member is compared
    with the ``WINDOW`` members before and after it.

    Without ``read`` the estimate decides. Among many rows of one template, with a similarity a little below the
    threshold, some estimates are above it, and a few such pairs join all of the rows. ``read`` returns the shingles of
    rows by number; they then decide wherever the estimate is within some standard errors of the threshold. Memory
    in addition to the arguments: about 100 bytes a row, and 4 a shingle of rows that are read.
    """
    # Rows of equal text need no signature: only the first of them is searched for.
    label = first_equal(exact_keys)
    bands = choose_bands(threshold, signature.shape[1], recall)
    search = _Search(signature, bands, label, np.flatnonzero(label == np.arange(len(label))))
    if read is None:
        search.join(lambda first, second, estimated: estimated >= threshold)
        return Clusters(label, search.compared, 0, search.left_out)
    # First search: join certain pairs and collect the uncertain ones. Then the shingles of their rows decide.
    # At a threshold of 1 the standard error is 0 and no pair would be uncertain, so it is taken at 0.95 at most.
    exact = _ExactDecision(threshold, standard_error(min(threshold, 0.95), signature.shape[1]), len(label))
    search.join(exact.collect)
    compared = search.compared
    left_out = search.left_out
    if exact.count:
        exact.sets = read(np.flatnonzero(exact.is_uncertain))
        if exact.count <= STORED_PAIRS:
            first, second = exact.collected_pairs()
            # Estimates were not stored. ``possible`` stands in for all of them, so shingles decide on every pair.
            similar = exact.decide(first, second, np.full(len(first), exact.possible))
            join(label, first[similar], second[similar])
        else:
            search.join(exact.decide)  # too many pairs to store, so search the buckets again
    return Clusters(label, compared, exact.compared, left_out)


class _ExactDecision:
    """Decision by shingles on pairs whose estimated similarity is too close to the threshold."""

    def __init__(self, threshold: float, error: float, rows: int) -> None:
        self.threshold = threshold
        self.sure = threshold + SURE * error
        self.possible = threshold - DOUBT * error
        self.is_uncertain = np.zeros(rows, dtype=bool)
        """(N,) bool: True for rows of uncertain pairs."""
        self.count = 0
        """Uncertain pairs; pairs of several bands are counted several times."""
        self.compared = 0
        """Pairs whose shingles were compared."""
        self.sets: Sets | None = None
        self._pairs: list[np.ndarray] = []

    def collect(self, first: np.ndarray, second: np.ndarray, estimated: np.ndarray) -> np.ndarray:
        """Return (P,) bool, True for certain pairs, and store the uncertain ones as first * N + second."""
        # Above ``sure`` only the estimate decides, below ``possible`` the pair is out; in between, shingles decide.
        between = (estimated >= self.possible) & (estimated < self.sure)
        self.is_uncertain[first[between]] = True
        self.is_uncertain[second[between]] = True
        self.count += int(between.sum())
        if self.count <= STORED_PAIRS:
            # One number per pair, so duplicates from several bands go with ``np.unique``.
            self._pairs.append(first[between] * len(self.is_uncertain) + second[between])
        return estimated >= self.sure

    def collected_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored pairs (P,), each once, since most of them share several bands."""
        first, second = np.divmod(np.unique(np.concatenate(self._pairs)), len(self.is_uncertain))
        return first, second

    def decide(self, first: np.ndarray, second: np.ndarray, estimated: np.ndarray) -> np.ndarray:
        """Return (P,) bool, True for similar pairs; shingles decide on the uncertain ones."""
        assert self.sets is not None
        similar: np.ndarray = estimated >= self.sure
        between = np.flatnonzero((estimated >= self.possible) & ~similar)
        self.compared += len(between)
        similar[between] = self.sets.jaccard(first[between], second[between]) >= self.threshold
        return similar


Judge = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""A function from pairs of rows and their estimated similarities, (P,) each, to (P,) bool: True for similar rows."""


class _Search:
    """Search of the buckets of all bands, band after band, that joins similar rows."""

    def __init__(self, signature: np.ndarray, bands: Bands, label: np.ndarray, rows: np.ndarray) -> None:
        self.signature = signature
        self.bands = bands
        self.label = label
        self.rows = rows
        self.compared = self.left_out = 0

    def join(self, judge: Judge) -> None:
        """Join the pairs that ``judge`` finds similar; pairs of one cluster are skipped."""
        self.compared = self.left_out = 0
        for band in range(self.bands.count):
            # Rows of a bucket are neighbors in ``order``, so candidates are neighbors at most ``WINDOW`` apart.
            order, bucket = self._buckets(band)
            self.left_out += _beyond_window(bucket)
            similar_pairs = []
            for first, second in _neighbors(order, bucket):
                # Pairs that an earlier band has put into one cluster need no comparison.
                apart = self.label[first] != self.label[second]
                first = first[apart]
                second = second[apart]
                self.compared += len(first)
                similar = judge(first, second, estimate(self.signature, first, second))
                similar_pairs.append(np.stack([first[similar], second[similar]]))
            # Join after each band, so later bands skip pairs that are in one cluster by now.
            if similar_pairs:
                join(self.label, *np.concatenate(similar_pairs, axis=1))

    def _buckets(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of buckets with several members, bucket after bucket, and their buckets' numbers."""
        bits = np.uint64(len(self.rows).bit_length())
        # The key's high bits and the row are packed into one number, since sorting numbers is ten times as fast as
        # argsort. Rows that share a bucket only because of the lost low bits differ in their signatures.
        packed = np.sort((self._key(band) >> bits << bits) | np.arange(len(self.rows), dtype=np.uint64))
        key = packed >> bits
        same = key[1:] == key[:-1]
        # A row shares its bucket if a neighbor on either side has the same key. A new key begins the next bucket.
        shared = np.append(same, False) | np.append(False, same)
        bucket = np.cumsum(np.diff(key[shared], prepend=key[:1]) != 0)
        return self.rows[(packed[shared] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)], bucket

    def _key(self, band: int) -> np.ndarray:
        """Return (rows,) uint64, equal where signatures agree in the band."""
        begin = band * self.bands.rows
        end = begin + self.bands.rows
        key = np.zeros(len(self.rows), dtype=np.uint64)
        for start in range(begin, end, 8):  # 8 bytes at a time, as one 64-bit number
            stop = min(start + 8, end)
            chunk = np.zeros((len(self.rows), 8), dtype=np.uint8)
            chunk[:, : stop - start] = self.signature[self.rows, start:stop]
            # Chain the chunks: what is hashed so far is mixed with the next 8 bytes.
            key = mix(key ^ chunk.view("<u8")[:, 0])
        return key


def _beyond_window(bucket: np.ndarray) -> int:
    """Return the number of pairs of a bucket that no window covers."""
    # A bucket of n rows has n - d pairs at distance d. Beyond the window these are n - 1 - WINDOW, ..., 2, 1 pairs.
    sizes = np.bincount(bucket)
    beyond = np.maximum(sizes[sizes > 0] - 1 - WINDOW, 0)
    return int((beyond * (beyond + 1) // 2).sum())


def _neighbors(order: np.ndarray, bucket: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of rows of one bucket at most ``WINDOW`` places apart, in groups."""
    for begin in range(0, len(order), _PAIRS):
        for distance in range(1, WINDOW + 1):
            places = np.arange(begin, min(begin + _PAIRS, len(order) - distance))
            places = places[bucket[places] == bucket[places + distance]]
            if not len(places):
                # No pair at this distance, so none at a larger distance: buckets are contiguous.
                break
            yield order[places], order[places + distance]


def standard_error(threshold: float, permutations: int) -> float:
    """Return the standard error of an estimated similarity near the threshold."""
    return math.sqrt(threshold * (1 - threshold) / permutations)


def reply_texts_with_marks(row: Row) -> list[tuple[str, int]]:
    """Return each text of the replies, with 1 if it is not to be imitated, else 0."""
    return [(text, int(is_bad_reply(row, field))) for field, text in reply_texts(row, "both")]


def compared_texts(row: Row, part: ComparedPart) -> list[tuple[str, int]]:
    """Return the texts to compare, with their marks. System turns are skipped: all rows of a source may share one."""
    if is_text(row):
        return [(row["text"], 0)]
    texts: list[tuple[str, int]] = []
    if part != "reply":
        texts += [(message.get("content") or "", 0) for message in row["prompt"] if message["role"] != "system"]
    if part != "prompt":
        texts += reply_texts_with_marks(row)
    return texts


def comparison_key(row: Row, part: ComparedPart) -> str:
    """Return a text that is equal for rows of equal content; case, punctuation and white space do not count."""
    if is_text(row):
        return prompt_key(row)
    content: list[Any] = [] if part == "reply" else [prompt_key(row)]
    if part != "prompt":
        # The mark keeps a row apart from a row with chosen and rejected exchanged.
        content += [[normalized(text), mark] for text, mark in reply_texts_with_marks(row)]
    return json.dumps(content)


def check_part(part: ComparedPart, kind: str, step: str) -> None:
    """Raise ``UserError`` where rows of this kind have no such part."""
    if part == "reply" and kind == "prompts":
        raise UserError(
            f"{step}: 'of: reply' in a recipe of kind prompts, whose rows have no reply; write 'of: prompt'."
        )
    if part != "row" and kind == "texts":
        raise UserError(f"{step}: 'of: {part}' in a recipe of kind texts, whose rows have no turns; write 'of: row'.")


def join(label: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Give rows that pairs connect one label, the least. ``label`` always points to the first row of each cluster.

    ``label`` (N,) is changed in place; ``first`` and ``second`` (P,) are the rows of each pair.
    """
    while True:
        # Union-find over arrays: hook roots onto smaller ones, compress paths, and repeat with the pairs still apart.
        ends = np.sort(np.stack([label[first], label[second]]), axis=0)
        apart = ends[0] != ends[1]
        if not apart.any():
            return
        first = first[apart]
        second = second[apart]
        # Point the later cluster at the earlier one, then follow the pointers until every row points at a first row.
        np.minimum.at(label, ends[1][apart], ends[0][apart])
        while not np.array_equal(target := label[label], label):
            label[:] = target


def first_equal(keys: np.ndarray) -> np.ndarray:
    """Return (N,) int64: for each row the first row with its key."""
    first, inverse = np.unique(keys, return_index=True, return_inverse=True)[1:]
    rows: np.ndarray = first[inverse.reshape(-1)].astype(np.int64)
    return rows


def first_stays(count: int, places: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``code`` and ``instead`` of a verdict on ``count`` rows that drops all but the first of each cluster.

    ``places`` (M,) are the rows that were compared, ``label`` (M,) the place among them of the row that stands for
    each. The dropped rows get reason 0.
    """
    is_later = label != np.arange(len(places))
    code = np.full(count, -1, dtype=np.int32)
    instead = np.full(count, -1, dtype=np.int64)
    code[places[is_later]] = 0
    instead[places[is_later]] = places[label[is_later]]
    return code, instead
