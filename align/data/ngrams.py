"""Hashes of n-grams of words, by which near-duplicate removal, decontamination and splits compare texts.

Words are those of :func:`align.data.rows.normalized`, except that in scripts without spaces (Chinese, Japanese, Thai,
Khmer, Lao, Burmese) every character is a word. All texts of a block form one array of bytes. The hash of any run of
words is the difference of two prefix sums of a polynomial over it, so a block takes a few passes in numpy for any
n. Hashes are equal on every machine and in every process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_BYTES = 1 << 18
"""Size of a block of texts, which keeps its arrays in the processor's cache."""
LONGEST_BYTES = 1 << 22
"""Part of a longer text that is compared."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_SPACE = 32
_SPACES = [*range(9, 14), *range(28, 33)]  # ASCII white space of str.split()
# ASCII equivalents of quotes, and of the white space that NFKC leaves.
_ASCII_EQUIVALENTS = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "\x85": "\n",
        "\u1680": " ",
        "\u2028": "\n",
        "\u2029": "\n",
    }
)
_EDGES = b'.:;!?\n\r"()[]{}|*#>-'
"""Signs that end or enclose a sentence, a line or a label; they separate the words on either side."""
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_UNSPACED_LEADS = bytes([0xE0, 0xE1, *range(0xE3, 0xEA), 0xEF, 0xF0])  # their first bytes in UTF-8, shared with others


def mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit numbers evenly over all 64 bits, one to one (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = values.astype(np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def constants(count: int, stream: int) -> np.ndarray:
    """Return (count,) fixed random uint64 numbers; numpy's generators may change with its version."""
    return mix((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(_MULTIPLIER))


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    table[ord("A") : ord("Z") + 1] += 32
    table[[*_SPACES, *map(ord, ".,:;!?\"'`")]] = _SPACE
    return table


_BYTE = _byte_table().tobytes()
_BYTE_VALUE = constants(256, stream=1)


@lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the multiplier and of its inverse, (size,) uint64 each, from 0 on, modulo 2**64."""

    def powers_of(base: int) -> np.ndarray:
        # Products of uint64 wrap around, which is arithmetic modulo 2**64.
        factors = np.full(size, base, dtype=np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    return powers_of(_MULTIPLIER), powers_of(pow(_MULTIPLIER, -1, 1 << 64))


def encode(text: str) -> bytes:
    """Return the bytes whose words are compared; ``read_words`` normalizes ASCII case, punctuation and space."""
    if text.isascii():
        return text.encode()[:LONGEST_BYTES]
    text = text[:LONGEST_BYTES]
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    text = text.translate(_ASCII_EQUIVALENTS)
    encoded = text.encode("utf-8", "surrogatepass")
    # Cheap test by first bytes before the regular expression.
    if len(encoded.translate(None, _UNSPACED_LEADS)) < len(encoded):
        encoded = _UNSPACED.sub(r" \1 ", text).encode("utf-8", "surrogatepass")
    # Cut again: characters may take several bytes, and unspaced scripts have got spaces.
    return encoded[:LONGEST_BYTES]


def is_unspaced(text: str) -> bool:
    """Return True for a text with characters of a script without spaces, each of which is a word."""
    return not text.isascii() and _UNSPACED.search(text) is not None


@dataclass(frozen=True)
class Words:
    """The words of N texts."""

    first: np.ndarray
    """(N + 1,) int64: first word of each text in ``start`` and ``end``, and the number of words."""
    start: np.ndarray
    """(W,) int64: first byte of each word in the compacted bytes."""
    end: np.ndarray
    """(W,) int64: byte after its last one."""
    sums: np.ndarray
    """(bytes + 1,) uint64: prefix sums of byte value times power."""
    opens: np.ndarray | None = None
    """(W,) bool, with ``edges``: the word begins a text, a sentence, a line or the text after a label."""
    closes: np.ndarray | None = None
    """(W,) bool, with ``edges``: the word ends one of these."""

    @property
    def counts(self) -> np.ndarray:
        """Return (N,) int64, the number of words in each text."""
        return np.diff(self.first)

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return hashes (S,) uint64 of all runs of ``size`` words, text after text, and (N + 1,) the first of each.

        A shorter text has one run, all of its words; a text without words has none.
        """
        counts = self.counts
        # A text of c words has c - size + 1 runs; a shorter one has a single run of all its words.
        runs = np.maximum(counts - size + 1, np.minimum(counts, 1))
        offsets = np.concatenate([[0], np.cumsum(runs)])
        # Number all runs through, then shift each text's numbers to its own first word.
        shift = np.repeat(self.first[:-1] - offsets[:-1], runs)
        first_words = np.arange(offsets[-1]) + shift
        # The single run of a short text ends at the text's last word.
        last_words = np.minimum(first_words + (size - 1), np.repeat(self.first[1:] - 1, runs))
        return self._hash(first_words, last_words), offsets

    def exact_runs(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return hashes (S,) uint64 of all runs of exactly ``size`` words, their texts and first words (S,)."""
        hashes, offsets = self.ngrams(size)
        text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        first = self.first[text] + np.arange(len(hashes)) - offsets[text]
        is_full = self.counts[text] >= size
        return hashes[is_full], text[is_full], first[is_full]

    def hash_texts(self) -> np.ndarray:
        """Return (N,) uint64, a hash of each text's words in order; 0 for a text without words."""
        hashes = np.zeros(len(self.first) - 1, dtype=np.uint64)
        has_words = self.counts > 0
        hashes[has_words] = self._hash(self.first[:-1][has_words], self.first[1:][has_words] - 1)
        return hashes

    def _hash(self, first_words: np.ndarray, last_words: np.ndarray) -> np.ndarray:
        """Return hashes (S,) of the words from ``first_words`` to ``last_words``, both included.

        The place of the words does not matter.
        """
        begin = self.start[first_words]
        inverse = _powers(_power_of_two(len(self.sums)))[1]
        # The difference of prefix sums is sum(value * power ** place); dividing by power ** begin removes the place.
        return mix((self.sums[self.end[last_words]] - self.sums[begin]) * inverse[begin])


def read_words(texts: Sequence[bytes], edges: bool = False) -> Words:
    """Return the words of texts of :func:`encode`, about ``BLOCK_BYTES``; ``edges`` adds ``opens`` and ``closes``."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    # One space between texts, so no word spans two of them.
    bounds = np.concatenate([[0], np.cumsum(lengths + 1)])
    # The empty text at the end also puts a space behind the last word.
    joined = b" ".join([*texts, b""])
    letters = np.frombuffer(joined.translate(_BYTE), dtype=np.uint8)
    inside = letters != _SPACE
    # Words begin and end at the switches between space and sign.
    switches = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    begins = switches[0::2]
    ends = switches[1::2]
    # Compact the bytes to each word and one space after it, so white space and punctuation do not count.
    retained = inside
    retained[ends] = True
    compact = letters[retained]
    # In the compacted bytes every word takes its own length and one space.
    end = np.cumsum(ends - begins + 1) - 1
    start = end - (ends - begins)
    # Prefix sums of byte value times power: the hash of any run is a difference of two of them.
    powers = _powers(_power_of_two(len(compact) + 1))[0]
    sums = np.empty(len(compact) + 1, dtype=np.uint64)
    sums[0] = 0
    np.cumsum(_BYTE_VALUE.take(compact) * powers[: len(compact)], out=sums[1:])
    first = np.searchsorted(begins, bounds)
    return Words(first, start, end, sums, *(_edges(joined, first, begins, ends) if edges else ()))


_IS_EDGE = np.isin(np.arange(256), list(_EDGES))


def _edges(joined: bytes, first: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the words that open and the words that close a stretch of text, (W,) bool each.

    An edge between two words is a sign that belongs to no word, or that ends the first or begins the second one:
    ``1) What is it (in short)``. A capital letter after a word ends a stretch too: ``The capital of Peru is A) Lima``.
    """
    letters = np.frombuffer(joined, dtype=np.uint8)
    signs = np.concatenate([[0], np.cumsum(_IS_EDGE[letters])])
    opens = np.ones(len(begins), dtype=bool)
    closes = np.ones(len(begins), dtype=bool)
    # Prefix sums of edge signs: a difference tells whether one is between two words, touching bytes included.
    opens[1:] = signs[begins[1:]] > signs[ends[:-1] - 1]
    following = letters[begins[1:]]
    capital = (following >= ord("A")) & (following <= ord("Z"))
    closes[:-1] = (signs[begins[1:] + 1] > signs[ends[:-1]]) | capital
    has_words = np.diff(first) > 0
    # The ends of a text are edges without any sign.
    opens[first[:-1][has_words]] = True
    closes[first[1:][has_words] - 1] = True
    return opens, closes


@dataclass(frozen=True)
class Block:
    """The texts of some rows. A row has parts, which no run of words spans."""

    first: int
    """Number of the first row."""
    parts: np.ndarray
    """(rows + 1,) int64: first part of each row among the block's parts."""
    marks: np.ndarray
    """(parts,) int64: mark of each part."""
    words: Words
    """Words of all parts."""

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return :meth:`Words.ngrams` row after row: hashes (S,), and the first of each row (rows + 1,)."""
        hashes, offsets = self.words.ngrams(size)
        return hashes, offsets[self.parts]


def blocks(rows: Iterable[Sequence[tuple[str, int]]], edges: bool = False) -> Iterator[Block]:
    """Yield rows (lists of parts with a mark) in blocks of about ``BLOCK_BYTES``; ``edges`` as in ``read_words``."""
    first = size = 0
    texts: list[bytes] = []
    marks: list[int] = []
    parts = [0]

    def block() -> Block:
        return Block(first, np.array(parts, dtype=np.int64), np.array(marks, dtype=np.int64), read_words(texts, edges))

    for row in rows:
        for text, mark in row:
            texts.append(encode(text))
            marks.append(mark)
            size += len(texts[-1])
        parts.append(len(texts))
        # A row is never divided between two blocks.
        if size >= BLOCK_BYTES:
            yield block()
            first += len(parts) - 1
            size = 0
            texts = []
            marks = []
            parts = [0]
    if len(parts) > 1:
        yield block()


def _power_of_two(size: int) -> int:
    # Few different sizes, so the cache of ``_powers`` serves nearly all blocks.
    return max(2 * BLOCK_BYTES, 1 << (size - 1).bit_length())


Part = tuple[str, int]
"""A text and its mark."""

_ELEMENTS = 1 << 21
"""Shingles compared at once."""


def shingles(block: Block, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes (S,) uint64 of a block's shingles, at least one a row, and the first of each row (rows + 1,)."""
    hashes, offsets = block.words.ngrams(size)
    # Marked parts are salted, so a rejected answer never matches an equal chosen one.
    if block.marks.any():
        hashes = mix(hashes ^ np.repeat(_salt(block.marks), np.diff(offsets)))
    offsets = offsets[block.parts]  # of rows instead of parts
    wordless = np.diff(offsets) == 0
    # Rows without words get one fixed shingle, so every row has one.
    hashes = np.insert(hashes, offsets[:-1][wordless], constants(1, stream=6))
    # Each inserted shingle moves the rows behind it by one place.
    return hashes, offsets + np.concatenate([[0], np.cumsum(wordless)])


def hash_rows(block: Block) -> np.ndarray:
    """Return (rows,) uint64, equal for rows of equal words in equal parts."""
    # A polynomial of the parts' hashes, so their order counts.
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

    def jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return (P,) float64: the exact Jaccard similarity of pairs of rows, given by number (P,)."""
        first = np.searchsorted(self.rows, first)
        second = np.searchsorted(self.rows, second)
        sizes = np.diff(self.offsets)
        both = sizes[first] + sizes[second]
        similarity = np.empty(len(first))
        # Pairs are compared in groups with about ``_ELEMENTS`` shingles each.
        ends = np.searchsorted(np.cumsum(both), np.arange(_ELEMENTS, both.sum() + _ELEMENTS, _ELEMENTS), side="right")
        begin = 0
        for end in [*(ends + 1).tolist(), len(first)]:
            span = slice(begin, min(end, len(first)))
            shared = self._shared(first[span], second[span])
            similarity[span] = shared / (both[span] - shared)
            begin = span.stop
        return similarity

    def _shared(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return (P,) int64: the number of common shingles of pairs of places."""
        # A shingle that both rows of a pair have occurs twice under the pair's number.
        keys = np.concatenate([self._keys(first), self._keys(second)])
        keys.sort(kind="stable")  # merges the two runs, each of which ascends
        common = keys[1:][keys[1:] == keys[:-1]]
        counts: np.ndarray = np.bincount((common >> np.uint64(32)).astype(np.int64), minlength=len(first))
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
