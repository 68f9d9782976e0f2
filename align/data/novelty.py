"""How much a text repeats one that is there already: ROUGE-L against a pool of tens of thousands. Torch-free.

ROUGE-L is the F-measure of the longest common subsequence of words, 2 LCS / (m + n) (Lin 2004), by which self-instruct
tells new tasks from old ones (arXiv 2212.10560). That is one minus the normalized insert-and-delete distance, which
rapidfuzz computes on strings; each word stands as one character. Left out: stemming, which self-instruct does not do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from rapidfuzz import process
from rapidfuzz.distance import Indel

# As in Google's rouge_score, letters and digits in lower case; here of every script, and a character of a script that
# writes no spaces is a word of its own.
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_CODES = 0x110000


def rouge_words(text: str) -> list[str]:
    """Words as ROUGE-L compares them."""
    return _WORD.findall((text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).lower())


class Nearest(NamedTuple):
    """The text of the pool that is most alike, and how much: 0 nothing in common, 1 the same words."""

    similarity: float
    text: str


class Pool:
    """Texts to compare with."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # by number of words
        self._coded: defaultdict[int, list[str]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        coded = self._code(text)
        self._texts[len(coded)].append(text)
        self._coded[len(coded)].append(coded)

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def _code(self, text: str) -> str:
        """The text with each word as one character. Past a million different words some would share one."""
        return "".join(self._codes.setdefault(word, chr(len(self._codes) % _CODES)) for word in rouge_words(text))

    def nearest(self, text: str) -> Nearest | None:
        """The most similar text, one of the nearest length where several are; None where none shares a word."""
        coded = self._code(text)
        best: Nearest | None = None
        # Closest lengths first: texts whose lengths differ by so much that they cannot be closer are not looked at.
        for length in sorted(self._coded, key=lambda length: (abs(length - len(coded)), length)):
            least = 0.0 if best is None else best.similarity
            reachable = 2 * min(length, len(coded)) / max(1, length + len(coded))
            if reachable <= least:
                continue
            found = process.extractOne(
                coded, self._coded[length], scorer=Indel.normalized_similarity, score_cutoff=least or None
            )
            if found is not None and found[1] > least:
                best = Nearest(found[1], self._texts[length][found[2]])
        return best
