"""Formats with a better and a worse answer, and the one with single answers that were found good or bad."""

from __future__ import annotations

import math
import re
from typing import Any

from align.data.formats.fields import (
    CHOSEN,
    COMPLETIONS,
    CONVERSATIONS,
    LABELS,
    PROMPTS,
    REJECTED,
    Malformed,
    Unusable,
    first,
)
from align.data.formats.instructions import question
from align.data.formats.messages import messages, reply, text, tools, with_system
from align.data.formats.options import FormatOptions
from align.data.rows import Dropped, Message, Row, assistant, user

TRUE = ("true", "yes", "1", "good", "desirable", "chosen")
FALSE = ("false", "no", "0", "bad", "undesirable", "rejected")
OF_TWO_SIDES = ("preferences", "unpaired")
"""Kinds of rows that the rejected answer has a part in."""


def number(value: Any, name: str = "score") -> float | None:
    """A score as a finite number; None where there is none."""
    try:
        found = None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise Malformed(f"a {name} is {value!r}, expected a number") from None
    if found is not None and not math.isfinite(found):
        raise Malformed(f"a {name} is {value!r}, expected a finite number")
    return found


def truth(value: Any) -> bool:
    """A label as a truth value. Text is read as words: any text at all would count as true otherwise."""
    if isinstance(value, bool):
        return value
    word = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).strip().lower()
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise Malformed(f"a label is {value!r}, expected true or false")


def parse_transcript(words: str) -> list[Message] | None:
    """Turns of an hh-rlhf transcript, or None when text stands before the first turn.

    Turns are cut before chosen and rejected are compared: a comparison by characters puts the opening that both
    replies share into the prompt. The two line breaks before a role and the blank behind its colon belong to the
    separator; all other white space is text.
    """
    head, *rest = re.split(r"\n\n(Human|Assistant): ?", words)
    if head.strip() or not rest:
        return None
    roles = {"Human": user, "Assistant": assistant}
    return [roles[role](content) for role, content in zip(rest[::2], rest[1::2], strict=True)]


def from_hh(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """Two transcripts that differ in their last turn; of kinds that are no pairs, the chosen one alone."""
    chosen = _conversation(record, "chosen")
    draft: Row = {"prompt": chosen[:-1], "chosen": [chosen[-1]]}
    if kind not in OF_TWO_SIDES:
        return [draft]
    rejected = _conversation(record, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("prompts differ")
    return [draft | {"rejected": [rejected[-1]]}]


def _conversation(record: dict[str, Any], side: str) -> list[Message]:
    turns = parse_transcript(text(record[side], side))
    if turns is None:
        raise Unusable("not a transcript")
    if turns[-1]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    return turns


def from_preferences(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """chosen and rejected, each text, one message or a conversation, the prompt beside them or inside."""
    better, worse = first(record, CHOSEN), first(record, REJECTED)
    assert better is not None and worse is not None
    before, chosen = reply(record[better], better, options)
    other, rejected = reply(record[worse], worse, options)
    if before != other:
        raise Unusable("prompts differ")
    found = with_system(record, before) if before else _beside(record, better, worse, options)
    draft: Row = {"prompt": found, "chosen": [chosen], "rejected": [rejected], "tools": tools(record)}
    for side in ("chosen", "rejected"):
        name = first(record, (f"{side}_score", f"score_{side}", f"{side}_rating", f"{side}-rating"))
        score = number(record[name]) if name else None
        if score is not None:
            draft[f"{side}_score"] = score
    return [draft]


def _beside(record: dict[str, Any], better: str, worse: str, options: FormatOptions) -> list[Message]:
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    if name is None:
        known = ", ".join((*PROMPTS, *CONVERSATIONS))
        raise Malformed(f"'{better}' and '{worse}' are single replies and there is no prompt ({known})")
    return question(record, name, options)


def from_unpaired(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """An answer and whether it is a good one: prompt, completion and label, or messages and label."""
    mark = first(record, LABELS)
    assert mark is not None
    label = truth(record[mark])
    answer, talk = first(record, COMPLETIONS), first(record, CONVERSATIONS)
    if answer is not None:
        ask = first(record, (*PROMPTS, *CONVERSATIONS))
        assert ask is not None
        before, completion = question(record, ask, options), reply(record[answer], answer, options)[1]
    elif talk is not None:
        before, completion = reply(messages(record[talk], talk, options), talk, options)
        before = with_system(record, before)
    else:
        raise Malformed(f"a label and no answer beside it ({', '.join((*COMPLETIONS, *CONVERSATIONS))})")
    return [{"prompt": before, "completion": [completion], "label": label, "tools": tools(record)}]
