"""Filters by unfilled placeholders, and by keywords in the user's turns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.data.row_texts import excerpt, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.base import RowFilter

SELF_INSTRUCT = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
"""Keywords of tasks that a text model cannot do, from the code of Self-Instruct (arXiv 2212.10560)."""

# {{name}} as templates have it and <noinput> as Alpaca's data does. [Your Name] stays: a letter on request ends so.
_PLACEHOLDER = re.compile(r"(?<!\$)\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}|<\s*no ?input\s*>", re.IGNORECASE)
_CODE = re.compile(r"`[^`\n]+`")


def find_placeholder(text: str) -> str | None:
    """Return the first placeholder outside code; inside code ``{{name}}`` belongs to a template engine."""
    if "{{" not in text and "<" not in text:
        return None
    match = _PLACEHOLDER.search(_CODE.sub("", without_code(text)))
    return match[0] if match else None


class PlaceholderFilter(RowFilter):
    """Drops rows with a placeholder in any text: rejected replies teach it just like chosen ones."""

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            placeholder = find_placeholder(text)
            if placeholder:
                return Dropped("filter: placeholder", {"in": field, "excerpt": placeholder})
        return None


class KeywordFilter(RowFilter):
    """Drops rows with one of some words in a user's turn; full words, in any case."""

    def __init__(self, words: Sequence[str]) -> None:
        # The longest first, so that "go to" wins over "go".
        ordered = sorted(set(words), key=lambda word: (-len(word), word))
        alternatives = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in ordered)
        self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in prompt_texts(row, "user"):
            match = self._pattern.search(text)
            if match:
                word = " ".join(match[0].lower().split())
                detail = {"in": field, "excerpt": excerpt(text, match.start(), match.end())}
                return Dropped(f"filter: keyword {word}", detail)
        return None
