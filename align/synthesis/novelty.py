"""Similarity of a text to its nearest neighbor: ROUGE-L against a pool of tens of thousands of texts. Torch-free.

ROUGE-L is the F-measure of the longest common subsequence of words, 2 LCS / (m + n) (Lin 2004), by which self-instruct
tells new tasks from known ones (arXiv 2212.10560). It equals one minus the normalized insert-and-delete distance, which
rapidfuzz computes on strings; here each word is one character. No stemming, like self-instruct.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from align.config.extras import missing_extra

try:
    from rapidfuzz import process
    from rapidfuzz.distance import Indel
except ModuleNotFoundError:
    raise missing_extra("rapidfuzz", "data", "synthesize with task: instructions") from None

# Letters and digits in lower case, as in Google's rouge_score; here of every script, and in scripts without spaces
# every character is a word.
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_CODES = 0x110000


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE-L compares."""
    return _WORD.findall((text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).lower())


class Nearest(NamedTuple):
    """The most similar text of the pool, and its similarity: 0 without a common word, 1 for the same words."""

    similarity: float
    text: str


class Pool:
    """Texts to compare with, indexed by their number of words."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # by number of words
        self._coded: defaultdict[int, list[str]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text to the pool."""
        coded = self._code(text)
        self._texts[len(coded)].append(text)
        self._coded[len(coded)].append(coded)

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def _code(self, text: str) -> str:
        """Return the text with each word as one character. Beyond a million different words some share one."""
        return "".join(self._codes.setdefault(word, chr(len(self._codes) % _CODES)) for word in rouge_words(text))

    def nearest(self, text: str) -> Nearest | None:
        """Return the most similar text, among equals one of similar length; None where none shares a word."""
        coded = self._code(text)
        best: Nearest | None = None
        # Nearest lengths first. The lengths alone bound the similarity, so most texts need no comparison.
        for length in sorted(self._coded, key=lambda length: (abs(length - len(coded)), length)):
            lower_bound = 0.0 if best is None else best.similarity
            upper_bound = 2 * min(length, len(coded)) / max(1, length + len(coded))
            if upper_bound <= lower_bound:
                continue
            # Below the cutoff rapidfuzz gives up early and returns None.
            match = process.extractOne(
                coded, self._coded[length], scorer=Indel.normalized_similarity, score_cutoff=lower_bound or None
            )
            if match is None:
                continue
            _, similarity, index = match
            if similarity > lower_bound:
                best = Nearest(similarity, self._texts[length][index])
        return best
