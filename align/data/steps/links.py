"""Filter by addresses of web pages, and removal of addresses from texts.

Not covered: whether a page exists, and bare names such as example.org without ``www.`` or a scheme.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from align.config.recipe.filter_settings import Sides
from align.data.row_texts import change_texts, excerpt, prompt_texts, reply_texts
from align.data.rows import Dropped, Row

_URL = r"(?:\b(?:https?|ftps?)://|\bwww\.(?=[\w-]+\.\w))[^\s<>\"`{}|\\^\[\]，。、）】》]+"
_LINKED = rf"{_URL[:-2]}()]+(?:\([^\s()]*\))?(?: \"[^\"\n]{{0,300}}\")?"
_ADDRESS = re.compile(_URL, re.IGNORECASE)
# In this order: an image of Markdown, a link of Markdown (its words stay), an address in angle brackets, a bare one.
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
        self._strip, self._sides = action == "strip", sides

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
