"""Filters for text from the web: addresses of pages, stock phrases, and repetition.

- Addresses: it is not checked if a page exists, and bare names such as example.org need ``www.`` or a scheme.
- Stock phrases are refusals, "as an AI language model", and models that name their makers. The rules are in
  boilerplate.json, each with texts that it must match and texts that it must not; English only. A rule ``at`` the
  ``start`` reads the opening of a reply, which has the refusal. A rule for ``anywhere`` is tried only on texts with a
  word that it ``needs``, which makes the filter fast.
- Repetition comes from a looping model, a scraper or a copy-paste. Fractions and their limits are Gopher's (arXiv
  2112.11446, Table A1), counted as datatrove does: an occurrence counts from its second time on. Two rules on
  sentences, after open-instruct's filter for reasoning traces, also cover short texts. Code, tables and sums are
  removed first, since they repeat by nature.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Literal, NamedTuple

from align.config.recipe.filter_settings import Boilerplate, Repetition, Sides
from align.data.row_texts import change_texts, excerpt, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.step import RowFilter

_URL = r"(?:\b(?:https?|ftps?)://|\bwww\.(?=[\w-]+\.\w))[^\s<>\"`{}|\\^\[\]，。、）】》]+"
_LINKED = rf"{_URL[:-2]}()]+(?:\([^\s()]*\))?(?: \"[^\"\n]{{0,300}}\")?"
_ADDRESS = re.compile(_URL, re.IGNORECASE)
# In this order: an image of Markdown, a link of Markdown (its words stay), an address in angle brackets, a bare URL.
_REMOVABLE = re.compile(
    rf"!\[[^\]\n]{{0,300}}\]\({_LINKED}\)|\[(?P<words>[^\]\n]{{1,300}})\]\({_LINKED}\)|<{_URL}>|{_URL}", re.IGNORECASE
)
_PUNCTUATION = ".,;:!?'\"*_)"
"""Punctuation that ends a sentence rather than an address."""


def has_url(text: str) -> bool:
    """Return False only for a text without any address; cheap."""
    return "://" in text or "www." in text.lower()


def find_url(text: str) -> re.Match[str] | None:
    """Return the match of the first address in a text."""
    return _ADDRESS.search(text) if has_url(text) else None


def strip_urls(text: str) -> str:
    """Return a text without addresses; the words of a Markdown link and the punctuation after an address stay."""
    if not has_url(text):
        return text
    parts: list[str] = []
    position = 0
    for match in _REMOVABLE.finditer(text):
        before = text[position : match.start()]
        replacement = _replacement(match)
        position = match.end()
        following = replacement[:1] or text[position : position + 1]
        # Of the blanks around a removed address one stays between words, none before punctuation or a line end.
        if not match["words"] and (not following or following in _PUNCTUATION + "\n"):
            before = before.rstrip(" \t")
        elif following == " " and before[-1:] == " ":
            before = before[:-1]
        parts += [before, replacement]
    return "".join([*parts, text[position:]]) if parts else text


def _replacement(match: re.Match[str]) -> str:
    """Return the words of a link, else the punctuation at the address's end that is not part of it."""
    if match["words"]:
        return match["words"]
    text = match[0]
    if text[0] in "<!":
        return ""
    # Trailing punctuation belongs to the sentence.
    end = len(text.rstrip(_PUNCTUATION))
    # A closing bracket belongs to the address if it was opened in it, as in Wikipedia's.
    while end < len(text) and text[end] == ")" and text[:end].count("(") > text[:end].count(")"):
        end += 1
    return text[end:]


class UrlFilter:
    """Drops rows with an address in a user's turn or a reply, or removes addresses from every text."""

    def __init__(self, action: Literal["drop", "strip"], sides: Sides) -> None:
        self._strip = action == "strip"
        self._sides = sides

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """Return each row or ``Dropped``; a row with a text of nothing but an address is always dropped."""
        if self._strip:
            return [self._strip_row(row) for row in rows]
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row, "user"), *reply_texts(row, self._sides)):
            match = find_url(text)
            if match:
                return Dropped("filter: url", {"in": field, "excerpt": excerpt(text, match.start(), match.end())})
        return None

    def _strip_row(self, row: Row) -> Row | Dropped:
        new = change_texts(row, strip_urls)
        if new is row:
            return row
        for field, text in (*prompt_texts(new, "user"), *reply_texts(new, "both")):
            if not text.strip():
                return Dropped("filter: nothing but a url", {"in": field})
        return new


_OPENING = 300
"""Characters of a reply that count as its start."""
_GREETING = r"[\s\"'“*_>]*(?:(?:oh|hi|hello|hey|well|hmm|no|ah|yes|okay|ok)(?: there)?[,.!…]+ )?"
"""Greetings and interjections that may precede a refusal."""


def boilerplate_identities() -> dict[str, str]:
    """Return the digest of the rules that come with align."""
    return {"boilerplate.json": f"sha256:{hashlib.sha256(_rules_text().encode()).hexdigest()}"}


@dataclass(frozen=True)
class Rule:
    """One stock phrase. ``pattern`` is tried only on texts with a lower-case word in ``needs``."""

    kind: str
    name: str
    position: str
    """``start`` or ``anywhere``."""
    needs: tuple[str, ...]
    pattern: re.Pattern[str]
    finds: tuple[str, ...]
    passes: tuple[str, ...]

    def search(self, text: str, lower: str) -> re.Match[str] | None:
        """Return the match of the phrase; ``lower`` is ``text`` in lower case."""
        if self.position == "start":
            return self.pattern.match(text, 0, _OPENING)
        # Plain search for a word is much faster than the pattern.
        for word in self.needs:
            if word in lower:
                return self.pattern.search(text)
        return None if self.needs else self.pattern.search(text)


def _rules_text() -> str:
    return resources.files("align.data.steps").joinpath("boilerplate.json").read_text(encoding="utf-8")


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rules that come with align, in the order in which they are tried."""
    data = json.loads(_rules_text())
    compiled_rules = []
    for entry in data["rules"]:
        pattern = entry["pattern"]
        # Patterns share lists of words, written as {name}.
        for name, words in data["words"].items():
            pattern = pattern.replace("{" + name + "}", words)
        start = _GREETING if entry["at"] == "start" else ""
        compiled = re.compile(start + f"(?:{pattern})", re.IGNORECASE)
        compiled_rules.append(
            Rule(
                kind=entry["kind"],
                name=entry["name"],
                position=entry["at"],
                needs=tuple(entry.get("needs", ())),
                pattern=compiled,
                finds=tuple(entry["for"]),
                passes=tuple(entry["against"]),
            )
        )
    return tuple(compiled_rules)


class BoilerplateFilter(RowFilter):
    """Drops rows whose reply holds a stock phrase."""

    def __init__(self, config: Boilerplate, sides: Sides) -> None:
        user_rules = [
            Rule("pattern", pattern, "anywhere", (), re.compile(pattern, re.IGNORECASE), (), ())
            for pattern in config.patterns
        ]
        self._rules = [*(rule for rule in rules() if rule.kind in config.kinds), *user_rules]
        self._sides = sides

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in reply_texts(row, self._sides):
            lower = text.lower()
            for rule in self._rules:
                match = rule.search(text, lower)
                if match:
                    detail = {"rule": rule.name, "in": field, "excerpt": excerpt(text, match.start(), match.end())}
                    return Dropped(f"filter: {rule.kind}", detail)
        return None


GOPHER_LINES = 0.30
GOPHER_LINE_CHARS = 0.20
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
        self._config = config
        self._sides = sides

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
        earlier: set[str] = set()
        repeated: list[str] = []
        for part in parts:
            if part in earlier:
                repeated.append(part)
            earlier.add(part)
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
        earlier: set[tuple[str, ...]] = set()
        repeated = 0
        start = 0
        first = ""
        # A repeated n-gram is counted once and skipped as a whole, so overlapping ones count no character twice.
        while start < len(ngrams):
            if ngrams[start] in earlier:
                first = first or " ".join(ngrams[start])
                repeated += len(" ".join(ngrams[start]))
                start += size
            else:
                earlier.add(ngrams[start])
                start += 1
        if repeated > limit * scale * chars:
            return Repeat(f"{size}-grams", repeated / chars, limit * scale, first)
    return None
