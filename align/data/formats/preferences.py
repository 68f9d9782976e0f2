"""Formats with a better and a worse answer, and the format with single answers labeled good or bad."""

from __future__ import annotations

import math
import re
from typing import Any

from align.config.recipe.format_options import ReadingOptions
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
from align.data.formats.messages import lone_reply, messages, reply, text, tools, with_system
from align.data.rows import Dropped, Message, Row, assistant, user

TRUE = ("true", "yes", "1", "good", "desirable", "chosen")
FALSE = ("false", "no", "0", "bad", "undesirable", "rejected")
KINDS_WITH_REJECTED = ("preferences", "unpaired")
"""Kinds of rows that use the rejected answer."""


def parse_number(value: Any, name: str = "score") -> float | None:
    """Return a score as a finite number; None where there is none. Raises ``Malformed`` for anything else."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Malformed(f"a {name} is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise Malformed(f"a {name} is {value!r}, expected a finite number")
    return number


def parse_label(value: Any) -> bool:
    """Return a label as a truth value. Text is read as a word, since any text would count as true otherwise."""
    if isinstance(value, bool):
        return value
    # CSV and tables write labels as 1, 1.0, "yes" and the like.
    word = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).strip().lower()
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise Malformed(f"a label is {value!r}, expected true or false")


def parse_transcript(transcript: str) -> list[Message] | None:
    """Return the turns of an hh-rlhf transcript, or None when text precedes the first turn.

    Turns are cut before chosen and rejected are compared: a comparison by characters would put the opening that both
    replies share into the prompt. The two line breaks before a role and the blank after its colon belong to the
    separator; all other white space is text.
    """
    # The split keeps the speakers, so names and texts alternate in ``rest``.
    head, *rest = re.split(r"\n\n(Human|Assistant): ?", transcript)
    if head.strip() or not rest:
        return None
    roles = {"Human": user, "Assistant": assistant}
    return [roles[role](content) for role, content in zip(rest[::2], rest[1::2], strict=True)]


def from_hh(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert two transcripts that differ in their last turn; other kinds than pairs get the chosen one alone."""
    chosen = _conversation(record, "chosen")
    draft: Row = {"prompt": chosen[:-1], "chosen": [chosen[-1]]}
    # Without use for the rejected side, its faults should not cost the row.
    if kind not in KINDS_WITH_REJECTED:
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


def from_preferences(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert chosen and rejected, each text, one message or a conversation, with a shared prompt field or inside."""
    chosen_name, rejected_name = first(record, CHOSEN), first(record, REJECTED)
    assert chosen_name is not None and rejected_name is not None
    # Each side may carry its prompt; then both must be the same.
    prompt, chosen = reply(record[chosen_name], chosen_name, options)
    rejected_prompt, rejected = reply(record[rejected_name], rejected_name, options)
    if prompt != rejected_prompt:
        raise Unusable("prompts differ")
    prompt = with_system(record, prompt) if prompt else _prompt_field(record, chosen_name, rejected_name, options)
    draft: Row = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": tools(record)}
    for side in ("chosen", "rejected"):
        name = first(record, (f"{side}_score", f"score_{side}", f"{side}_rating", f"{side}-rating"))
        score = parse_number(record[name]) if name else None
        if score is not None:
            draft[f"{side}_score"] = score
    return [draft]


def _prompt_field(record: dict[str, Any], chosen: str, rejected: str, options: ReadingOptions) -> list[Message]:
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    if name is None:
        known = ", ".join((*PROMPTS, *CONVERSATIONS))
        raise Malformed(f"'{chosen}' and '{rejected}' are single replies and there is no prompt ({known})")
    return question(record, name, options)


def from_unpaired(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a labeled answer: prompt, completion and label, or messages and label."""
    label_name = first(record, LABELS)
    assert label_name is not None
    label = parse_label(record[label_name])
    answer, conversation = first(record, COMPLETIONS), first(record, CONVERSATIONS)
    if answer is not None:
        prompt_name = first(record, (*PROMPTS, *CONVERSATIONS))
        assert prompt_name is not None
        prompt = question(record, prompt_name, options)
        completion = lone_reply(record[answer], answer, options)
    elif conversation is not None:
        turns, completion = reply(messages(record[conversation], conversation, options), conversation, options)
        prompt = with_system(record, turns)
    else:
        raise Malformed(f"a label without an answer ({', '.join((*COMPLETIONS, *CONVERSATIONS))})")
    return [{"prompt": prompt, "completion": [completion], "label": label, "tools": tools(record)}]
