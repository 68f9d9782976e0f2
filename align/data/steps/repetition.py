"""Filter by repetition: text left by a looping model, a scraper or a copy-paste.

Fractions and their limits are Gopher's (arXiv 2112.11446, Table A1), counted as datatrove does: an occurrence counts
from its second time on. Two rules on sentences, after open-instruct's filter for reasoning traces, also cover short
texts. Code, tables and sums are removed first, since they repeat by nature.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from align.config.recipe.filter_settings import Repetition, Sides
from align.data.row_texts import excerpt, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.base import RowFilter

GOPHER_LINES, GOPHER_LINE_CHARS = 0.30, 0.20
"""Share of repeated lines, and of characters in them; the same limits hold for paragraphs."""
GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Share of characters in all occurrences of the most frequent n-gram, by n."""
GOPHER_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Share of characters in repeated n-grams, by n."""


class Repeat(NamedTuple):
    """A rule that a text breaks."""

    rule: str
    amount: float
    limit: float
    text: str
    """The text that repeats."""


class RepetitionFilter(RowFilter):
    """Drops rows whose reply repeats itself."""

    def __init__(self, config: Repetition, sides: Sides) -> None:
        self._config, self._sides = config, sides

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in reply_texts(row, self._sides):
            repeat = find_repetition(text, self._config)
            if repeat is not None:
                detail = {
                    "found": round(repeat.amount, 3),
                    "limit": round(repeat.limit, 3),
                    "in": field,
                    "excerpt": excerpt(repeat.text, 0, 100),
                }
                return Dropped(f"filter: repetition of {repeat.rule}", detail)
        return None


def find_repetition(text: str, config: Repetition) -> Repeat | None:
    """Return the first rule that ``text`` breaks, or None."""
    text = prose(text)
    words = text.lower().split()
    if len(words) < 8:  # two sentences of four words
        return None
    repeat = _check_sentences(text, config)
    # Gopher's shares need some length: in a short text a single repeated phrase is a large share.
    if repeat is None and len(words) >= config.min_words:
        repeat = (
            _check_blocks(text, config.scale)
            or _check_top_ngram(words, config.scale)
            or _check_duplicate_ngrams(words, config.scale)
        )
    return repeat


_CODE_LINE = re.compile(
    r"\s*(?:import |from \S+ import |return\b|def |class |elif |else:|try:|except|\}|\{|</?\w|#include|//|\||>>> )"
    r"|.*[;{}]\s*$|\s{4,}\S|\s*[\w.\[\]]+ *(?:[-+*/|&]?=|\+\+|--|<-) *\S|\s*[\w.]+\([^)]*\):?\s*$"
    r"|[\W\d_]*$"
)


def prose(text: str) -> str:
    """Return a text without fenced code, lines that look like code, table rows, and lines without a letter."""
    text = without_code(text)
    # A single line is prose; the patterns below are for lines of code.
    if "\n" not in text:
        return text
    return "\n".join(line for line in text.split("\n") if not line or not _CODE_LINE.match(line))


_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*|\n+")
_MATHS = re.compile(r"[\d=+*/^<>\\|]")


def _check_sentences(text: str, config: Repetition) -> Repeat | None:
    sentences = [part for part in map(str.strip, _SENTENCE_END.split(text)) if len(part) >= 10]
    if len(sentences) == len(set(sentences)):
        return None
    for key, limit, counts in (
        ("consecutive_sentences", config.consecutive_sentences, _longest_runs(sentences)),
        ("same_sentence", config.same_sentence, Counter(sentences)),
    ):
        if limit is None:
            continue
        for sentence, count in counts.items():
            # Steps of a calculation look alike, so lines of mathematics may repeat twice as often.
            sentence_limit = 2 * limit if _MATHS.search(sentence) else limit
            if count >= sentence_limit:
                return Repeat(key.replace("_", " "), count, sentence_limit, sentence)
    return None


def _longest_runs(items: list[str]) -> dict[str, int]:
    """Return the longest run of each item that appears twice in succession somewhere."""
    longest: dict[str, int] = {}
    run = 1
    for before, item in pairwise(items):
        run = run + 1 if item == before else 1
        if run > 1:
            longest[item] = max(run, longest.get(item, 0))
    return longest


def _check_blocks(text: str, scale: float) -> Repeat | None:
    for name, blocks in (("paragraph", re.split(r"\n{2,}", text)), ("line", text.split("\n"))):
        parts = [part for part in map(str.strip, blocks) if part]
        known: set[str] = set()
        repeated: list[str] = []
        for part in parts:
            if part in known:
                repeated.append(part)
            known.add(part)
        if not repeated:
            continue
        share = len(repeated) / len(parts)
        chars = sum(map(len, repeated)) / sum(map(len, parts))
        if share > GOPHER_LINES * scale:
            return Repeat(f"{name}s", share, GOPHER_LINES * scale, repeated[0])
        if chars > GOPHER_LINE_CHARS * scale:
            return Repeat(f"{name}s by length", chars, GOPHER_LINE_CHARS * scale, repeated[0])
    return None


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _check_top_ngram(words: list[str], scale: float) -> Repeat | None:
    chars = sum(map(len, words)) + len(words) - 1
    for size, limit in GOPHER_TOP.items():
        counts = Counter(_ngrams(words, size))
        lengths = [(count * len(" ".join(ngram)), ngram) for ngram, count in counts.items() if count > 1]
        # The n-gram that covers most characters, which need not be the most frequent one.
        length, top = max(lengths, default=(0, ()))
        share = length / chars
        if share > limit * scale:
            return Repeat(f"top {size}-gram", share, limit * scale, " ".join(top))
    return None


def _check_duplicate_ngrams(words: list[str], scale: float) -> Repeat | None:
    chars = sum(map(len, words)) + len(words) - 1
    for size, limit in GOPHER_DUPLICATE.items():
        ngrams = _ngrams(words, size)
        if len(set(ngrams)) == len(ngrams):
            return None  # then no longer n-gram repeats either
        known: set[tuple[str, ...]] = set()
        repeated, start, first = 0, 0, ""
        # A repeated n-gram is counted once and skipped as a whole, so that overlapping ones count no character twice.
        while start < len(ngrams):
            if ngrams[start] in known:
                first = first or " ".join(ngrams[start])
                repeated += len(" ".join(ngrams[start]))
                start += size
            else:
                known.add(ngrams[start])
                start += 1
        if repeated > limit * scale * chars:
            return Repeat(f"{size}-grams", repeated / chars, limit * scale, first)
    return None
