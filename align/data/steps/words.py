"""Filter by placeholders that nobody filled in, and by words in the user's turns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.data.rows import Dropped, Row
from align.data.steps.texts import excerpt, prompt_texts, reply_texts, without_code

SELF_INSTRUCT = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
"""What Self-Instruct (arXiv 2212.10560, its code) leaves out: a model that reads and writes text cannot do it."""

# {{name}} as templates have it and <noinput> as Alpaca's data does. [Your Name] stays: a letter on request ends so.
_PLACEHOLDER = re.compile(r"(?<!\$)\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}|<\s*no ?input\s*>", re.IGNORECASE)
_CODE = re.compile(r"`[^`\n]+`")


def find_placeholder(text: str) -> str | None:
    """The first placeholder outside code, where ``{{name}}`` is a template engine's."""
    if "{{" not in text and "<" not in text:
        return None
    match = _PLACEHOLDER.search(_CODE.sub("", without_code(text)))
    return match[0] if match else None


class PlaceholderFilter:
    """Drops rows with a placeholder in any text: rejected replies teach it as well as chosen ones."""

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row."""
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            found = find_placeholder(text)
            if found:
                return Dropped("filter: placeholder", {"in": field, "excerpt": found})
        return None


class KeywordFilter:
    """Drops rows with one of some words in a user's turn; whole words, whatever the case."""

    def __init__(self, words: Sequence[str]) -> None:
        # The longest first, so that "go to" wins over "go".
        ordered = sorted(set(words), key=lambda word: (-len(word), word))
        alternatives = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in ordered)
        self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row."""
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in prompt_texts(row, "user"):
            match = self._pattern.search(text)
            if match:
                word = " ".join(match[0].lower().split())
                detail = {"in": field, "excerpt": excerpt(text, match.start(), match.end())}
                return Dropped(f"filter: keyword {word}", detail)
        return None
