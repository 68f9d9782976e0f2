"""Hashes of runs of words: what near-duplicate removal, decontamination and splits compare texts by.

Words are those of :func:`align.data.rows.normalized`, but that in scripts written without spaces (Chinese, Japanese,
Thai, Khmer, Lao, Burmese) every character is a word. All texts of a block are read as one array of bytes; the hash of
any run of words comes from two prefix sums of a polynomial over it, so that a block costs a few passes in numpy
whatever the length of the runs. Hashes are equal on every machine and in every process. Left out: anything that knows
what words mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_BYTES = 1 << 18
"""Texts are looked at in blocks of about this size, which keeps the arrays in the processor's cache."""
LONGEST_BYTES = 1 << 22
"""Of a longer text only this much is looked at."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_SPACE = 32
_SPACES = [*range(9, 14), *range(28, 33)]  # what str.split() takes for space in ASCII
# Quotes, and the white space that NFKC leaves, as what they are in ASCII.
_BEYOND_ASCII = str.maketrans({
    "“": '"', "”": '"', "‘": "'", "’": "'", "\x85": "\n", "\u1680": " ", "\u2028": "\n", "\u2029": "\n"
})  # fmt: skip
_EDGES = b'.:;!?\n\r"()[]{}|*#>-'
"""Signs that end a sentence, a line or a label, or enclose one; two words with such a sign between them are apart."""
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_UNSPACED_LEADS = bytes([0xE0, 0xE1, *range(0xE3, 0xEA), 0xEF, 0xF0])  # first bytes of those in UTF-8, and of others


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
    """(count,) fixed random 64-bit numbers; numpy's own generators may change with its version."""
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
    """The multiplier's powers from 0 on, and those of its inverse, modulo 2**64."""
    found = []
    for base in (_MULTIPLIER, pow(_MULTIPLIER, -1, 1 << 64)):
        powers = np.full(size, base, dtype=np.uint64)
        powers[0] = 1
        found.append(np.cumprod(powers))
    return found[0], found[1]


def encode(text: str) -> bytes:
    """The bytes whose words are compared; case, punctuation and space of ASCII are dealt with later, all at once."""
    if text.isascii():
        return text.encode()[:LONGEST_BYTES]
    text = text[:LONGEST_BYTES]
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
    text = text.casefold()
    text = text.translate(_BEYOND_ASCII)
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded.translate(None, _UNSPACED_LEADS)) < len(encoded):
        encoded = _UNSPACED.sub(r" \1 ", text).encode("utf-8", "surrogatepass")
    return encoded[:LONGEST_BYTES]


def is_unspaced(text: str) -> bool:
    """Whether a text has characters of a script without spaces, each of which is a word."""
    return not text.isascii() and _UNSPACED.search(text) is not None


@dataclass(frozen=True)
class Words:
    """The words of some texts."""

    first: np.ndarray
    """(N + 1,) int64: where each text's words begin in ``start`` and ``end``, and where the last one's end."""
    start: np.ndarray
    """(W,) int64: where each word begins in the compacted bytes."""
    end: np.ndarray
    """(W,) int64: where it ends."""
    sums: np.ndarray
    """(bytes + 1,) uint64: prefix sums of byte value times power."""
    opens: np.ndarray | None = None
    """(W,) bool, where asked for: the word begins a text, a sentence, a line or what stands behind a label."""
    closes: np.ndarray | None = None
    """(W,) bool, where asked for: the word ends one."""

    @property
    def counts(self) -> np.ndarray:
        """(N,) int64: words in each text."""
        return np.diff(self.first)

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (S,) uint64 of all runs of ``size`` words, text after text, and (N + 1,) where each text's begin.

        A text of fewer words has one run, all of it; one without words has none.
        """
        counts = self.counts
        runs = np.maximum(counts - size + 1, np.minimum(counts, 1))
        offsets = np.concatenate([[0], np.cumsum(runs)])
        shift = np.repeat(self.first[:-1] - offsets[:-1], runs)
        left = np.arange(offsets[-1]) + shift
        right = np.minimum(left + (size - 1), np.repeat(self.first[1:] - 1, runs))
        return self._hash(left, right), offsets

    def exact_runs(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes (S,) uint64 of all runs of ``size`` words, none of fewer, with their text and their first word."""
        hashes, offsets = self.ngrams(size)
        text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        first = self.first[text] + np.arange(len(hashes)) - offsets[text]
        enough = self.counts[text] >= size
        return hashes[enough], text[enough], first[enough]

    def whole(self) -> np.ndarray:
        """(N,) uint64: a hash of each text's words in order; 0 for a text without words."""
        found = np.zeros(len(self.first) - 1, dtype=np.uint64)
        some = self.counts > 0
        found[some] = self._hash(self.first[:-1][some], self.first[1:][some] - 1)
        return found

    def _hash(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Of the words from ``left`` to ``right``, both included: the same wherever in the bytes they stand."""
        begin = self.start[left]
        inverse = _powers(_power_of_two(len(self.sums)))[1]
        return mix((self.sums[self.end[right]] - self.sums[begin]) * inverse[begin])


def read_words(texts: Sequence[bytes], edges: bool = False) -> Words:
    """The words of some texts of :func:`encode`, best about ``BLOCK_BYTES`` in all; with ``opens`` and ``closes``."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    bounds = np.concatenate([[0], np.cumsum(lengths + 1)])
    joined = b" ".join([*texts, b""])
    letters = np.frombuffer(joined.translate(_BYTE), dtype=np.uint8)
    inside = letters != _SPACE
    switches = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    begins, ends = switches[0::2], switches[1::2]
    keep = inside  # each word, and the one space after it
    keep[ends] = True
    compact = letters[keep]
    end = np.cumsum(ends - begins + 1) - 1
    start = end - (ends - begins)
    powers = _powers(_power_of_two(len(compact) + 1))[0]
    sums = np.empty(len(compact) + 1, dtype=np.uint64)
    sums[0] = 0
    np.cumsum(_BYTE_VALUE.take(compact) * powers[: len(compact)], out=sums[1:])
    first = np.searchsorted(begins, bounds)
    return Words(first, start, end, sums, *(_edges(joined, first, begins, ends) if edges else ()))


_IS_EDGE = np.isin(np.arange(256), list(_EDGES))


def _edges(joined: bytes, first: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which words open and which close a stretch of text. (W,) bool each.

    Between two words counts what no word contains, and the sign that the first ends with or the second begins with:
    ``1) What is it (in short)``. A capital letter behind a word ends a stretch too: ``The capital of Peru is A) Lima``.
    """
    letters = np.frombuffer(joined, dtype=np.uint8)
    signs = np.concatenate([[0], np.cumsum(_IS_EDGE[letters])])
    opens, closes = np.ones(len(begins), dtype=bool), np.ones(len(begins), dtype=bool)
    opens[1:] = signs[begins[1:]] > signs[ends[:-1] - 1]
    following = letters[begins[1:]]
    capital = (following >= ord("A")) & (following <= ord("Z"))
    closes[:-1] = (signs[begins[1:] + 1] > signs[ends[:-1]]) | capital
    some = np.diff(first) > 0
    opens[first[:-1][some]] = True
    closes[first[1:][some] - 1] = True
    return opens, closes


@dataclass(frozen=True)
class Block:
    """Some rows' texts. A row has parts, which no run of words spans."""

    first: int
    """Which row is the first."""
    parts: np.ndarray
    """(rows + 1,) int64: where each row's parts begin among the block's."""
    marks: np.ndarray
    """(parts,) int64: each part's mark."""
    words: Words
    """Of all parts."""

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Words.ngrams`, but row after row."""
        hashes, offsets = self.words.ngrams(size)
        return hashes, offsets[self.parts]


def blocks(rows: Iterable[Sequence[tuple[str, int]]], edges: bool = False) -> Iterator[Block]:
    """Rows, each a sequence of parts with a mark, in blocks of about ``BLOCK_BYTES``; with ``edges`` of their words."""
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
        if size >= BLOCK_BYTES:
            yield block()
            first, size, texts, marks, parts = first + len(parts) - 1, 0, [], [], [0]
    if len(parts) > 1:
        yield block()


def _power_of_two(size: int) -> int:
    return max(2 * BLOCK_BYTES, 1 << (size - 1).bit_length())
