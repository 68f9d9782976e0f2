"""Filter by repetition: text that a model looping, a scraper or a copy-paste left behind.

Fractions and their limits are Gopher's (arXiv 2112.11446, Table A1), counted as datatrove does: an occurrence counts
from its second time on. Two rules on sentences, after open-instruct's filter for reasoning traces, also see short
texts. Code, tables and sums are left out first: they repeat by nature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from pydantic import Field

from align.config.base import Config
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepContext
from align.data.steps.texts import Sides, excerpt, reply_texts, without_code

GOPHER_LINES, GOPHER_LINE_CHARS = 0.30, 0.20
"""Lines, and characters in lines, that stood there before; the same limits hold for paragraphs."""
GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Characters in all occurrences of the commonest n words in a row, by n."""
GOPHER_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Characters in n words in a row that stood there before, by n."""


class Repetition(Config):
    """Drop rows whose reply repeats itself."""

    scale: float = Field(2.0, gt=0, le=3)
    """Gopher's limits times this. Its own (1) are for web pages and drop one worked sum in ten (gsm8k), as replies are
    short and stay with their subject; 2 drops a fourteenth of that and finds nine in ten phrases that loop."""
    min_words: int = Field(50, ge=1)
    """Shares are taken of texts with at least this many words, as Gopher's documents have; in shorter ones a refrain
    or a word that is asked about is a large share."""
    consecutive_sentences: int | None = Field(4, ge=2)
    """A sentence that stands this many times in a row is too much, in a text of any length; twice as many where it
    holds figures or signs of mathematics."""
    same_sentence: int | None = Field(10, ge=2)
    """The same anywhere in the text."""

    def start(self, context: StepContext, sides: Sides = "chosen") -> RowStep:
        """The filter itself."""
        return _Repetition(self, sides)


class _Repetition:
    def __init__(self, config: Repetition, sides: Sides) -> None:
        self._config, self._sides = config, sides

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in reply_texts(row, self._sides):
            found = find_repetition(text, self._config)
            if found is not None:
                key, share, limit, what = found
                detail = {
                    "found": round(share, 3),
                    "limit": round(limit, 3),
                    "in": field,
                    "excerpt": excerpt(what, 0, 100),
                }
                return Dropped(f"filter: repetition of {key}", detail)
        return None


Found = tuple[str, float, float, str]
"""What is too much: its name, how much there is, the limit, and the text that repeats."""


def find_repetition(text: str, config: Repetition) -> Found | None:
    """The first rule that ``text`` breaks, or None."""
    text = prose(text)
    words = text.lower().split()
    if len(words) < 8:  # two sentences of four words
        return None
    found = _sentences(text, config)
    if found is None and len(words) >= config.min_words:
        found = _blocks(text, config.scale) or _top(words, config.scale) or _duplicates(words, config.scale)
    return found


_CODE_LINE = re.compile(
    r"\s*(?:import |from \S+ import |return\b|def |class |elif |else:|try:|except|\}|\{|</?\w|#include|//|\||>>> )"
    r"|.*[;{}]\s*$|\s{4,}\S|\s*[\w.\[\]]+ *(?:[-+*/|&]?=|\+\+|--|<-) *\S|\s*[\w.]+\([^)]*\):?\s*$"
    r"|[\W\d_]*$"
)


def prose(text: str) -> str:
    """Text without fenced code, lines that look like code, table rows, and lines without a letter."""
    text = without_code(text)
    if "\n" not in text:
        return text
    return "\n".join(line for line in text.split("\n") if not line or not _CODE_LINE.match(line))


_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*|\n+")
_MATHS = re.compile(r"[\d=+*/^<>\\|]")


def _sentences(text: str, config: Repetition) -> Found | None:
    sentences = [part for part in map(str.strip, _SENTENCE_END.split(text)) if len(part) >= 10]
    if len(sentences) == len(set(sentences)):
        return None
    for key, limit, counts in (
        ("consecutive_sentences", config.consecutive_sentences, _runs(sentences)),
        ("same_sentence", config.same_sentence, Counter(sentences)),
    ):
        for sentence, count in counts.items():
            if limit is not None and count >= (bound := 2 * limit if _MATHS.search(sentence) else limit):
                return key.replace("_", " "), count, bound, sentence
    return None


def _runs(items: list[str]) -> dict[str, int]:
    """The longest run of each item, for items that stand twice in a row somewhere."""
    longest: dict[str, int] = {}
    run = 1
    for before, item in pairwise(items):
        run = run + 1 if item == before else 1
        if run > 1:
            longest[item] = max(run, longest.get(item, 0))
    return longest


def _blocks(text: str, scale: float) -> Found | None:
    for name, parts in (("paragraph", re.split(r"\n{2,}", text)), ("line", text.split("\n"))):
        parts = [part for part in map(str.strip, parts) if part]
        seen: set[str] = set()
        again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
        if not again:
            continue
        share, chars = len(again) / len(parts), sum(map(len, again)) / sum(map(len, parts))
        if share > GOPHER_LINES * scale:
            return f"{name}s", share, GOPHER_LINES * scale, again[0]
        if chars > GOPHER_LINE_CHARS * scale:
            return f"{name}s by length", chars, GOPHER_LINE_CHARS * scale, again[0]
    return None


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _top(words: list[str], scale: float) -> Found | None:
    chars = sum(map(len, words)) + len(words) - 1
    for size, gopher in GOPHER_TOP.items():
        counts = Counter(_ngrams(words, size))
        often = [(count * len(" ".join(ngram)), ngram) for ngram, count in counts.items() if count > 1]
        length, top = max(often, default=(0, ()))
        share = length / chars
        if share > gopher * scale:
            return f"top {size}-gram", share, gopher * scale, " ".join(top)
    return None


def _duplicates(words: list[str], scale: float) -> Found | None:
    chars = sum(map(len, words)) + len(words) - 1
    for size, gopher in GOPHER_DUPLICATE.items():
        ngrams = _ngrams(words, size)
        seen: set[tuple[str, ...]] = set(ngrams)
        if len(seen) == len(ngrams):
            return None  # nor does anything longer stand there twice
        seen.clear()
        repeated, start, first = 0, 0, ""
        while start < len(ngrams):
            if ngrams[start] in seen:
                first = first or " ".join(ngrams[start])
                repeated += len(" ".join(ngrams[start]))
                start += size
            else:
                seen.add(ngrams[start])
                start += 1
        if repeated > gopher * scale * chars:
            return f"{size}-grams", repeated / chars, gopher * scale, first
    return None
