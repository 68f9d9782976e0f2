"""Which text of a row is compared with that of others. Torch-free."""

from __future__ import annotations

import json
from typing import Any, Literal

from align.data.rows import Row, is_text, normalized, prompt_key
from align.errors import UserError

Of = Literal["prompt", "reply", "row"]

_REPLIES = ("completion", "chosen", "rejected")
_MARK = 1
"""Of text that counts against what it says: a rejected answer, or one labeled False."""


def reply_parts(row: Row) -> list[tuple[str, int]]:
    """What the assistant is to answer, or not to: each text, and 1 where it counts against, 0 where not."""
    bad = {"rejected"} if row.get("label", True) is not False else {"rejected", "completion"}
    found = [
        (message.get("content") or "", _MARK if name in bad else 0)
        for name in _REPLIES
        for message in row.get(name) or ()
    ]
    return found + [(response["content"], 0) for response in row.get("responses") or ()]


def parts(row: Row, of: Of) -> list[tuple[str, int]]:
    """The texts compared and the mark of each. System turns are left out: a whole source may share one."""
    found: list[tuple[str, int]] = []
    if is_text(row):
        return [(row["text"], 0)]
    if of != "reply":
        found += [(message.get("content") or "", 0) for message in row["prompt"] if message["role"] != "system"]
    if of != "prompt":
        found += reply_parts(row)
    return found


def key(row: Row, of: Of) -> str:
    """Text that is equal for rows of equal content: case, punctuation and white space apart, as between splits."""
    found: list[Any] = [] if of == "reply" else [prompt_key(row)]
    if is_text(row):
        return prompt_key(row)
    if of != "prompt":
        found += [[normalized(text), mark] for text, mark in reply_parts(row)]
    return json.dumps(found)


def check(of: Of, kind: str, step: str) -> None:
    """Raises ``UserError`` where rows of this kind have nothing to compare."""
    if of == "reply" and kind == "prompts":
        raise UserError(
            f"{step}: 'of: reply' in a recipe of kind prompts, whose rows have no reply; write 'of: prompt'."
        )
    if of != "row" and kind == "texts":
        raise UserError(f"{step}: 'of: {of}' in a recipe of kind texts, whose rows have no turns; write 'of: row'.")
