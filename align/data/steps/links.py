"""Filter by addresses of web pages, and take them out of texts.

Leaves out whether a page exists, and bare names such as example.org that no ``www.`` or scheme introduces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from align.data.rows import Dropped, Row
from align.data.steps.texts import Sides, change_texts, excerpt, prompt_texts, reply_texts

Urls = Literal["keep", "drop", "strip"]

_URL = r"(?:\b(?:https?|ftps?)://|\bwww\.(?=[\w-]+\.\w))[^\s<>\"`{}|\\^\[\]，。、）】》]+"
_LINKED = rf"{_URL[:-2]}()]+(?:\([^\s()]*\))?(?: \"[^\"\n]{{0,300}}\")?"
_ADDRESS = re.compile(_URL, re.IGNORECASE)
# In this order: an image of Markdown, a link of Markdown (its words stay), an address in angle brackets, a bare one.
_TAKE_OUT = re.compile(
    rf"!\[[^\]\n]{{0,300}}\]\({_LINKED}\)|\[(?P<words>[^\]\n]{{1,300}})\]\({_LINKED}\)|<{_URL}>|{_URL}", re.IGNORECASE
)
_TAIL = ".,;:!?'\"*_)"
"""What ends a sentence rather than an address."""


def has_url(text: str) -> bool:
    """A quick look that is never wrong when it says no."""
    return "://" in text or "www." in text.lower()


def find_url(text: str) -> re.Match[str] | None:
    """The first address in a text."""
    return _ADDRESS.search(text) if has_url(text) else None


def strip_urls(text: str) -> str:
    """Text without addresses; the words of a Markdown link stay, and so does the punctuation after an address."""
    if not has_url(text):
        return text
    parts: list[str] = []
    at = 0
    for match in _TAKE_OUT.finditer(text):
        before, instead = text[at : match.start()], _instead(match)
        at = match.end()
        following = instead[:1] or text[at : at + 1]
        if not match["words"] and (not following or following in _TAIL + "\n"):
            before = before.rstrip(" \t")
        elif following == " " and before[-1:] == " ":
            before = before[:-1]
        parts += [before, instead]
    return "".join([*parts, text[at:]]) if parts else text


def _instead(match: re.Match[str]) -> str:
    """The words of a link, else the punctuation at the address's end that is not part of it."""
    if match["words"]:
        return match["words"]
    text = match[0]
    if text[0] in "<!":
        return ""
    end = len(text.rstrip(_TAIL))
    # A closing bracket belongs to the address if it was opened in it, as in Wikipedia's.
    while end < len(text) and text[end] == ")" and text[:end].count("(") > text[:end].count(")"):
        end += 1
    return text[end:]


class UrlFilter:
    """Drops rows with an address in a user's turn or a reply, or takes addresses out of every text."""

    def __init__(self, action: Literal["drop", "strip"], sides: Sides) -> None:
        self._strip, self._sides = action == "strip", sides

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row; a row of which nothing else is left in some text is dropped in any case."""
        return [self._without(row) if self._strip else self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row, "user"), *reply_texts(row, self._sides)):
            match = find_url(text)
            if match:
                return Dropped("filter: url", {"in": field, "excerpt": excerpt(text, match.start(), match.end())})
        return None

    def _without(self, row: Row) -> Row | Dropped:
        new = change_texts(row, strip_urls)
        if new is row:
            return row
        for field, text in (*prompt_texts(new, "user"), *reply_texts(new, "both")):
            if not text.strip():
                return Dropped("filter: nothing but a url", {"in": field})
        return new
