"""Recognize the thoughts of reasoning models in the text of a turn. Torch-free.

Episodes, simulated users, the parsers of tool calls, the linter and the graders of final answers recognize thoughts by
this module. The text of an episode has its special tokens in it, an answer to grade may have lost them.
"""

from __future__ import annotations

import re

TAGS = ("think", "thinking", "thought", "reasoning")
"""Names of the tags that models write around a thought."""
_NAMES = "|".join(TAGS)
LEADING = re.compile(
    rf"\s*(?:<(?P<tag>{_NAMES})>.*?(?:</(?P=tag)>|\Z)"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)"  # Magistral
    r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|\Z))",  # gpt-oss
    re.DOTALL,
)
"""A thought that a turn begins with. A thought that is never closed is the whole turn."""
OPENED = re.compile(
    rf"(?:(?!<(?:{_NAMES})>|\[THINK\]).)*?(?:</(?:{_NAMES})>|\[/THINK\])(?=\s|<|\[|\Z)",
    re.DOTALL,
)
"""A thought that the generation prompt has opened. A closing tag within a call's text is followed by more of it."""
EMPTY = re.compile(rf"(?:<(?:{_NAMES})>)?</(?:{_NAMES})>|(?:\[THINK\])?\[/THINK\]")
"""An empty thought without white space, or its end if the generation prompt has opened it."""

_MARK = re.compile(
    rf"(?P<tag_open><(?:{_NAMES})>)|(?P<tag_close></(?:{_NAMES})>)"
    r"|(?P<bracket_open>\[THINK\])|(?P<bracket_close>\[/THINK\])"
    r"|(?P<channel_open><\|channel\|>(?:analysis|commentary)\b|\Aanalysis(?=[A-Z]))"
    r"|(?P<channel_close><\|channel\|>final\b|assistantfinal)"
)
"""Text where a thought begins or ends. gpt-oss writes channels; only their names remain if special tokens are skipped
in decoding: ``analysisFive and … so 16.assistantfinal#### 16``."""


def hide_thoughts(text: str) -> str:
    """Replace the characters of the thoughts that a turn begins with by spaces."""
    end = 0
    while (thought := LEADING.match(text, end)) is not None:
        end = thought.end()
    opened = OPENED.match(text) if end == 0 else None
    if opened is not None:
        end = opened.end()
    return " " * end + text[end:]


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
        elif action == "close" and not opened and kind != "channel":
            pieces, start = [], mark.end()
    if opened:
        return None
    return " ".join([*pieces, text[start:]]).strip()
