"""The ``normalize`` step: Unicode, control characters, white space and the order of turns.

A row that is already clean comes back as the very same object, a changed one as a new dict, so that the build can
count changes by identity. Doing it twice changes nothing more. Code (a fenced block, or the indentation of a line)
keeps its white space. Leaves out what makes a row unwanted; only what cannot be put in order is dropped here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from align.data.rows import Dropped, Message, Row, is_text
from align.data.steps.base import RowStep, StepConfig, StepContext
from align.data.steps.texts import change_texts


class NormalizeStep(StepConfig):
    """Bring texts and turns into one form."""

    type: Literal["normalize"]
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode form. NFKC also turns full-width letters, ligatures, superscripts and the like into plain ones, in code
    too: x² becomes x2."""
    fix_encoding: bool = False
    """Repair text that was decoded wrongly (cafÃ© for café) with ftfy."""
    control: bool = True
    """Remove control characters, terminal escapes, zero-width and bidirectional-override characters; every kind of line
    end becomes a line feed."""
    whitespace: bool = True
    """Remove blanks at line ends, blank lines at both ends of a text, and those beyond ``blank_lines``; not in code."""
    blank_lines: int = Field(2, ge=1)
    """Most blank lines in a row."""
    turns: bool = True
    """Put system turns first as one, merge turns of one role in a row, and remove empty turns at the end of a prompt.
    Dropped: rows that still have an empty turn or reply, whose first or last turn is not the user's, or whose two
    replies have become the same."""

    def start(self, context: StepContext) -> RowStep:
        """The step itself."""
        return _Normalize(self)


class _Normalize:
    def __init__(self, config: NormalizeStep) -> None:
        self._change = text_normalizer(config)
        self._turns = config.turns

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | Dropped:
        row = change_texts(row, self._change)
        while self._turns:
            ordered = order_turns(row)
            if isinstance(ordered, Dropped) or ordered is row:
                return ordered
            # Merged turns are a new text: an open fence of the first reaches into the second.
            row = change_texts(ordered, self._change)
        return row


def text_normalizer(config: NormalizeStep) -> Callable[[str], str]:
    """The function that normalizes one text as ``config`` says."""
    steps: list[Callable[[str], str]] = []
    if config.control:
        steps.append(remove_control)
    if config.unicode != "none":
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

    def repaired(text: str) -> str:
        # What a zero-width character tore apart looks wrongly decoded only once that is gone, hence the rounds; each
        # makes the text shorter.
        for _ in range(10):
            before = text
            text = change(text if text.isascii() else ftfy.fix_encoding(text))
            if text == before or text.isascii():
                break
        return text

    return repaired


# Line ends of every kind; terminal escapes (colors); then what no reader sees: C0 and C1 controls but tab and line
# feed, soft hyphen, zero-width space, word joiner and invisible operators, bidirectional embeddings, overrides and
# isolates, interlinear notes, byte order mark, non-characters, and tags (hidden text) that belong to no flag.
# Zero-width joiners and directional marks stay: Persian, Hindi, Hebrew and emoji need them.
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ESCAPE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")
_FLAG = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,8}\U000e007f"
_UNSEEN = (
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
_MAYBE_INVISIBLE = re.compile(_UNSEEN)
_INVISIBLE = re.compile(f"({_FLAG})|{_UNSEEN}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


def remove_control(text: str) -> str:
    """Text without what no reader sees (see above).

    Surrogates, which UTF-8 cannot hold, become the character that a pair of them means, or U+FFFD.
    """
    if text.isascii() and not _ASCII_CONTROL.search(text):
        return text
    text = _ESCAPE.sub("", _LINE_END.sub("\n", _whole(text)))
    return _INVISIBLE.sub(lambda match: match[1] or "", text) if _MAYBE_INVISIBLE.search(text) else text


def _whole(text: str) -> str:
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_OTHER_END = re.compile(r"[^\S\n]\n")
_BLANK_START = re.compile(r"\A(?:[^\S\n]*\n)+")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def tidy_whitespace(text: str, blank_lines: int) -> str:
    """Text without blanks at line ends, blank lines at both ends, and more than ``blank_lines`` blank lines in a row.

    Fenced code stays as it is (Markdown's fences; an open one reaches to the end). Indentation stays, but for less than
    four columns before the very first word.
    """
    if _is_tidy(text, blank_lines):
        return text
    text = _BLANK_START.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text if text.startswith(("    ", "\t")) else text.lstrip()
    lines: list[str] = []
    fence, blanks = "", 0
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif mark and not (mark[1][0] == "`" and "`" in line[mark.end() :]):
            fence, blanks = mark[1], 0
        else:
            line = line.rstrip()
            blanks = 0 if line else blanks + 1
            if blanks > blank_lines:
                continue
        lines.append(line)
    return "\n".join(lines).rstrip()


def _is_tidy(text: str, blank_lines: int) -> bool:
    """A quick look: True only for a text that has nothing to tidy."""
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
    """The row with its prompt's turns in order, or why they cannot be.

    A tool's turns, and turns with more than a role and a content (calls of tools), are neither merged nor empty.
    """
    if is_text(row):
        return row if row["text"].strip() else Dropped("normalize: empty text")
    prompt = row["prompt"]
    if not _in_order(prompt):
        prompt = _put_in_order(prompt)
        if prompt != row["prompt"]:
            row = row | {"prompt": prompt}
    reason = _disorder(row)
    return Dropped(f"normalize: {reason}", {"roles": [str(m["role"]) for m in prompt][:20]}) if reason else row


def _in_order(prompt: list[Message]) -> bool:
    """Whether ``prompt`` is user, assistant, user … after at most one system turn: most prompts are."""
    start = 1 if prompt and prompt[0]["role"] == "system" else 0
    wanted = ("user", "assistant")
    return all(
        message["role"] == wanted[index % 2] and message.get("content") for index, message in enumerate(prompt[start:])
    ) and bool(not start or prompt[0].get("content"))


def _is_plain(message: dict[str, Any]) -> bool:
    return message["role"] in ("system", "user", "assistant") and not any(
        value for name, value in message.items() if name not in ("role", "content")
    )


def _is_empty(message: Message) -> bool:
    return _is_plain(message) and not (message.get("content") or "").strip()


def _put_in_order(prompt: list[Message]) -> list[Message]:
    turns = [message for message in prompt if message["role"] != "system"]
    while turns and _is_empty(turns[-1]):
        turns.pop()
    system = [message for message in prompt if message["role"] == "system" and not _is_empty(message)]
    merged: list[Message] = []
    for message in [*system, *turns]:
        last = merged[-1] if merged else None
        if (
            last
            and last["role"] == message["role"]
            and _is_plain(last)
            and _is_plain(message)
            and _alike(last, message)
        ):
            parts = [text for text in (last.get("content"), message.get("content")) if text]
            merged[-1] = last | {"content": "\n\n".join(parts)}
        else:
            merged.append(message)
    return merged


def _alike(one: Message, other: Message) -> bool:
    """Whether both turns are to be trained on, or neither."""
    return one.get("train") == other.get("train")


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
    replies = {name: row[name][-1] for name in ("completion", "chosen", "rejected") if row.get(name)}
    if any(_is_empty(reply) for reply in replies.values()):
        return "empty reply"
    if "chosen" in replies and replies["chosen"] == replies.get("rejected"):
        return "chosen equals rejected"
    return None
