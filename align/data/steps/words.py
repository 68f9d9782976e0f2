"""Filter by placeholders that nobody filled in, and by words in the user's turns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.data.rows import Dropped, Row
from align.data.steps.texts import excerpt, prompt_texts, reply_texts

SELF_INSTRUCT = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
"""What Self-Instruct (arXiv 2212.10560, its code) leaves out: a model that reads and writes text cannot do it."""

# {{name}} as templates have it, [insert name here] and [Your Name] as letters do, and <noinput> as Alpaca's data does.
_PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}|\[\s*(?:insert|enter|add|fill in|your)\b[^\]\n]{0,60}\]|<\s*no ?input\s*>",
    re.IGNORECASE,
)
_CODE = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def find_placeholder(text: str) -> re.Match[str] | None:
    """The first placeholder outside code, where ``{{name}}`` is a template engine's."""
    if "{{" not in text and "[" not in text and "<" not in text:
        return None
    if "`" in text or "~~~" in text:
        text = _CODE.sub(lambda match: " " * len(match[0]), text)
    return _PLACEHOLDER.search(text)


class PlaceholderFilter:
    """Drops rows with a placeholder in any text: rejected replies teach it as well as chosen ones."""

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row."""
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            match = find_placeholder(text)
            if match:
                quoted = excerpt(text, match.start(), match.end())
                return Dropped("filter: placeholder", {"in": field, "excerpt": quoted})
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
