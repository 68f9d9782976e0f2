"""The thoughts in an answer of a reasoning model, in the formats that models write. Torch-free.

Graders read an answer without them. Tool calls are parsed by ``tool_calls.py``, which hides only the first thought.
"""

from __future__ import annotations

import re

TAGS = "think|thinking|thought|reasoning"
"""Names of the tags around a thought, ``<think>…</think>``, as a pattern."""
_MARK = re.compile(
    rf"(?P<tag_open><(?:{TAGS})>)|(?P<tag_close></(?:{TAGS})>)"
    r"|(?P<channel_open><\|channel\|>(?:analysis|commentary)\b|\Aanalysis(?=[A-Z]))"
    r"|(?P<channel_close><\|channel\|>final\b|assistantfinal)"
)
"""Text where a thought begins or ends. gpt-oss writes channels; only their names remain if special tokens are skipped
in decoding: ``analysisFive and … so 16.assistantfinal#### 16``."""


def answer_text(text: str) -> str | None:
    """Return the text outside thoughts; None if a thought is never closed, because then there is no answer.

    A closing tag without an opening tag ends a thought that the generation prompt has opened.
    """
    pieces: list[str] = []
    start = 0
    opened = ""
    for mark in _MARK.finditer(text):
        kind, _, action = str(mark.lastgroup).partition("_")
        if action == "open" and not opened:
            pieces.append(text[start : mark.start()])
            opened = kind
        elif action == "close" and opened == kind:
            start, opened = mark.end(), ""
        elif action == "close" and not opened and kind == "tag":
            pieces, start = [], mark.end()
    if opened:
        return None
    return " ".join([*pieces, text[start:]]).strip()
