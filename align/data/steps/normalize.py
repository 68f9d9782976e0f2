"""The ``normalize`` step: Unicode, control characters, white space and the order of turns.

A clean row comes back as the same object, a changed one as a new dict, so the build can count changes by identity.
Normalizing twice has no further effect. Code (a fenced block, or the indentation of a line) keeps its white space. Only
rows that cannot be put in order are dropped here; quality is the business of ``filter``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from align.config.recipe.step_settings import NormalizeStep
from align.data.row_texts import change_texts, has_equal_sides
from align.data.rows import Dropped, Message, Row, is_text
from align.data.steps.step import ModelLoaders, StepContext
from align.errors import require_extra


def normalize_identities(config: NormalizeStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return nothing, since keys never counted ftfy's version. Raises ``UserError`` if it is not installed."""
    if config.fix_encoding:
        require_extra("ftfy", "data", "normalize.fix_encoding")
    return {}


class Normalize:
    """Normalizes the texts and turns of rows."""

    def __init__(self, config: NormalizeStep, context: StepContext) -> None:
        self._change = text_normalizer(config)
        self._turns = config.turns

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """Return each row, changed or not, or ``Dropped`` if its turns cannot be put in order."""
        return [self._normalize(row) for row in rows]

    def _normalize(self, row: Row) -> Row | Dropped:
        row = change_texts(row, self._change)
        # Merging turns may leave texts to normalize, and normalizing may empty a turn, so repeat until nothing changes.
        while self._turns:
            ordered = order_turns(row)
            if isinstance(ordered, Dropped) or ordered is row:
                return ordered
            # Merged turns are a new text: an open fence of the first now covers the second.
            row = change_texts(ordered, self._change)
        return row


def text_normalizer(config: NormalizeStep) -> Callable[[str], str]:
    """Return the function that normalizes one text as ``config`` says."""
    steps: list[Callable[[str], str]] = []
    if config.control:
        steps.append(remove_control)
    if config.unicode != "none":
        # ASCII text is the same in every form.
        form: Literal["NFC", "NFKC"] = config.unicode
        steps.append(lambda text: text if text.isascii() else unicodedata.normalize(form, text))
    if config.whitespace:
        steps.append(lambda text: tidy_whitespace(text, config.blank_lines))

    def change(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return _with_encoding(change) if config.fix_encoding else change


def _with_encoding(change: Callable[[str], str]) -> Callable[[str], str]:
    import ftfy

    def repair(text: str) -> str:
        # A zero-width character may hide wrongly decoded text until ``change`` removes it, hence several rounds; each
        # of them makes the text shorter.
        for _ in range(10):
            before = text
            text = change(text if text.isascii() else ftfy.fix_encoding(text))
            if text == before or text.isascii():
                break
        return text

    return repair


# Line ends of every kind; terminal escapes (colors); then invisible characters: C0 and C1 controls but tab and line
# feed, soft hyphen, zero-width space, word joiner and invisible operators, bidirectional embeddings, overrides and
# isolates, interlinear notes, byte order mark, non-characters, and tags (hidden text) that belong to no flag.
# Zero-width joiners and directional marks stay: Persian, Hindi, Hebrew and emoji need them.
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ESCAPE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")
_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,8}\U000e007f"
_INVISIBLE_CLASS = (
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
_MAYBE_INVISIBLE = re.compile(_INVISIBLE_CLASS)
_INVISIBLE = re.compile(f"({_FLAG})|{_INVISIBLE_CLASS}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


def remove_control(text: str) -> str:
    """Return a text without escapes and invisible characters (see above).

    Surrogates, which UTF-8 cannot encode, become the character that a pair of them encodes, or U+FFFD.
    """
    if text.isascii() and not _ASCII_CONTROL.search(text):
        return text
    text = _ESCAPE.sub("", _LINE_END.sub("\n", _join_surrogates(text)))
    return _INVISIBLE.sub(lambda match: match[1] or "", text) if _MAYBE_INVISIBLE.search(text) else text


def _join_surrogates(text: str) -> str:
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_OTHER_END = re.compile(r"[^\S\n]\n")
_BLANK_START = re.compile(r"\A(?:[^\S\n]*\n)+")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def tidy_whitespace(text: str, blank_lines: int) -> str:
    """Return a text without blanks at line ends, blank lines at both ends, and those beyond ``blank_lines`` in a row.

    Fenced code stays as it is (Markdown's fences; an open one reaches to the end). Indentation stays, but for less than
    four columns before the very first word.
    """
    if _is_tidy(text, blank_lines):
        return text
    text = _BLANK_START.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text if text.startswith(("    ", "\t")) else text.lstrip()
    lines: list[str] = []
    # Walk through the lines: inside a fence nothing changes, outside blanks are trimmed and counted.
    fence = ""
    blanks = 0
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            # A fence is closed by the same sign, at least as often, with only white space behind it.
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in line[mark.end() :]):
            fence = mark[1]
            blanks = 0
        else:
            line = line.rstrip()
            blanks = 0 if line else blanks + 1
            if blanks > blank_lines:
                continue
        lines.append(line)
    return "\n".join(lines).rstrip()


def _is_tidy(text: str, blank_lines: int) -> bool:
    """Return True only for a text with nothing to tidy; cheap."""
    return not (
        not text
        or text[0].isspace()
        or text[-1].isspace()
        or " \n" in text
        or "\r" in text
        or "\n" * (blank_lines + 2) in text
        or ("\n" in text and _OTHER_END.search(text))
    )


def order_turns(row: Row) -> Row | Dropped:
    """Return the row with its prompt's turns in order, or the reason why that is impossible.

    A tool's turns, and turns with more than a role and a content (tool calls), are never merged and never count as
    empty.
    """
    if is_text(row):
        return row if row["text"].strip() else Dropped("normalize: empty text")
    prompt = row["prompt"]
    if not _in_order(prompt):
        prompt = _put_in_order(prompt)
        if prompt != row["prompt"]:
            row = row | {"prompt": prompt}
    reason = _disorder(row)
    if reason is None:
        return row
    return Dropped(f"normalize: {reason}", {"roles": [str(message["role"]) for message in prompt][:20]})


def _in_order(prompt: list[Message]) -> bool:
    """Return True for user, assistant, user … after at most one system turn, as most prompts are; none may be empty."""
    start = 1 if prompt and prompt[0]["role"] == "system" else 0
    if start and not prompt[0].get("content"):
        return False
    roles = ("user", "assistant")
    return all(
        message["role"] == roles[index % 2] and message.get("content") for index, message in enumerate(prompt[start:])
    )


def _is_plain(message: dict[str, Any]) -> bool:
    return message["role"] in ("system", "user", "assistant") and not any(
        value for name, value in message.items() if name not in ("role", "content")
    )


def _is_empty(message: Message) -> bool:
    return _is_plain(message) and not (message.get("content") or "").strip()


def _put_in_order(prompt: list[Message]) -> list[Message]:
    turns = [message for message in prompt if message["role"] != "system"]
    # An empty turn at the end is no question: the turn before it is the last one.
    while turns and _is_empty(turns[-1]):
        turns.pop()
    # System turns move to the front, where merging joins them to one.
    system = [message for message in prompt if message["role"] == "system"]
    system = [message for message in system if not _is_empty(message)]
    merged: list[Message] = []
    # Neighbors of one role become one turn, as templates expect roles to alternate.
    for message in [*system, *turns]:
        if merged and _can_merge(merged[-1], message):
            parts = [text for text in (merged[-1].get("content"), message.get("content")) if text]
            merged[-1] = merged[-1] | {"content": "\n\n".join(parts)}
        else:
            merged.append(message)
    return merged


def _can_merge(first: Message, second: Message) -> bool:
    """Return True for plain turns of one role that are both trained on, or both not."""
    if first["role"] != second["role"] or first.get("train") != second.get("train"):
        return False
    return _is_plain(first) and _is_plain(second)


def _disorder(row: Row) -> str | None:
    turns = [message for message in row["prompt"] if message["role"] != "system"]
    if not turns:
        return "no turns"
    if turns[0]["role"] != "user":
        return "first turn is not the user's"
    if turns[-1]["role"] not in ("user", "tool"):
        return "last prompt turn is not the user's"
    if any(_is_empty(turn) for turn in turns):
        return "empty turn"
    replies = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name)]
    if any(_is_empty(reply[-1]) for reply in replies):
        return "empty reply"
    if has_equal_sides(row):
        return "chosen equals rejected"
    return None
