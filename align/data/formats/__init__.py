"""From the field's dataset formats to rows.

Each converter takes one raw record and gives a :class:`Conversation` or a :class:`Dropped` with its reason. A record
that does not have its format's fields is the user's mistake and raises; one that has them but cannot be used
(empty, identical, cut off) is dropped and counted. Leaves out reading, filtering and splitting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.data.formats.options import Format, FormatOptions
from align.data.rows import Dropped, Message, assistant, user
from align.errors import UserError
from align.validation import nearest

__all__ = ["Conversation", "Dropped", "Format", "FormatOptions", "convert", "parse_transcript"]

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system",
}  # fmt: skip

# What a record of each format has: every group needs one of its names.
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages", "conversations"),),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "alpaca": (("instruction",), ("output",)),
    "gsm8k": (("question",), ("answer",)),
    "hh_rlhf": (("chosen",), ("rejected",)),
    "preferences": (("chosen",), ("rejected",)),
    "prompt": (("prompt",),),
}
PAIRED = ("hh_rlhf", "preferences")
"""Formats that have a chosen and a rejected reply; the others have one reply, ``prompt`` none."""


@dataclass(frozen=True)
class Conversation:
    """A prompt (its last message is a user turn) and what may follow it."""

    prompt: list[Message]
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    checks: str = ""


def convert(record: dict[str, Any], form: Format, where: str) -> Conversation | Dropped:
    """Convert one record; ``where`` (file:line) opens the ``UserError`` of one that lacks the format's fields."""
    missing = [group for group in FIELDS[form] if not any(record.get(name) is not None for name in group)]
    if missing:
        raise UserError(_unrecognised(record, form, missing, where))
    try:
        found = CONVERTERS[form](record)
    except _Malformed as error:
        raise UserError(f"{where}: {error} (format {form}).") from None
    return found if isinstance(found, Dropped) else _check(found)


class _Malformed(ValueError):
    """A field holds something its format does not allow."""


def _unrecognised(record: dict[str, Any], form: str, missing: list[tuple[str, ...]], where: str) -> str:
    has = [name for name, value in record.items() if value is not None]
    needs = ", ".join(" or ".join(f"'{name}'" for name in group) for group in missing)
    text = (
        f"{where}: not a record of format {form}: {needs} missing; it has {', '.join(map(repr, has)) or 'no fields'}."
    )
    for group in missing:
        slip = next((name for name in has if nearest(name, group)), None)
        if slip:
            text += f" Is '{slip}' meant as '{group[0]}'?"
    fits = [name for name, groups in FIELDS.items() if all(any(n in has for n in group) for group in groups)]
    near = [name for name, groups in FIELDS.items() if any(any(n in has for n in group) for group in groups)]
    if fits:
        text += f" It fits format: {', '.join(fits)}."
    elif near:
        wanted = "; ".join(f"{n} ({' + '.join('/'.join(g) for g in FIELDS[n])})" for n in near)
        text += f" It nearly fits: {wanted}."
    return text


def _check(found: Conversation) -> Conversation | Dropped:
    """Drop what no trainer could use."""
    turns = [message for message in found.prompt if message["role"] != "system"]
    if any(message["role"] == "system" for message in found.prompt[1:]):
        return Dropped("system turn in the middle")
    if not turns or turns[-1]["role"] != "user":
        return Dropped("last prompt turn is not the user's")
    if any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        return Dropped("roles do not alternate")
    if not all(message["content"].strip() for message in found.prompt):
        return Dropped("empty prompt turn")
    replies = [reply for reply in (found.completion, found.chosen, found.rejected) if reply is not None]
    if not all(reply.strip() for reply in replies):
        return Dropped("empty reply")
    if found.chosen is not None and found.chosen.strip() == (found.rejected or "").strip():
        return Dropped("chosen equals rejected")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"'{name}' holds {type(value).__name__}, expected text")
    return value


def _message(value: Any, name: str) -> Message:
    """A message in chat (``role``, ``content``) or ShareGPT (``from``, ``value``) spelling."""
    if not isinstance(value, dict):
        raise _Malformed(f"'{name}' holds {type(value).__name__} where a message (role, content) was expected")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role not in ROLES:
        raise _Malformed(f"'{name}' has a message of role {role!r}; known roles: {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(content, f"{name}.content").strip()}


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):  # CSV holds a list as text
        try:
            value = json.loads(value)
        except ValueError:
            raise _Malformed(f"'{name}' holds text where a list of messages was expected") from None
    if not isinstance(value, list):
        raise _Malformed(f"'{name}' holds {type(value).__name__} where a list of messages was expected")
    return [_message(item, name) for item in value]


def _prompt(value: Any, name: str) -> list[Message]:
    return [user(value.strip())] if isinstance(value, str) else _messages(value, name)


def _reply(value: Any, name: str) -> tuple[list[Message], str | Dropped]:
    """Messages before the reply (none for plain text), and the reply."""
    if isinstance(value, str):
        return [], value.strip()
    messages = [_message(value, name)] if isinstance(value, dict) else _messages(value, name)
    if not messages:
        return [], Dropped("empty reply")
    if messages[-1]["role"] != "assistant":
        return messages, Dropped("last turn is not the assistant's")
    return messages[:-1], messages[-1]["content"]


def _from_messages(record: dict[str, Any]) -> Conversation | Dropped:
    name = "messages" if record.get("messages") is not None else "conversations"
    before, reply = _reply(_messages(record[name], name), name)
    return reply if isinstance(reply, Dropped) else Conversation(before, reply)


def _from_prompt_completion(record: dict[str, Any]) -> Conversation | Dropped:
    name = "completion" if record.get("completion") is not None else "response"
    before, reply = _reply(record[name], name)
    if before:
        raise _Malformed(f"'{name}' holds {len(before) + 1} messages, expected one assistant turn")
    return reply if isinstance(reply, Dropped) else Conversation(_prompt(record["prompt"], "prompt"), reply)


def _from_prompt(record: dict[str, Any]) -> Conversation:
    return Conversation(_prompt(record["prompt"], "prompt"))


def _from_alpaca(record: dict[str, Any]) -> Conversation | Dropped:
    # The input belongs to the user's turn: half of Alpaca's instructions mean nothing without it.
    parts = [_text(record["instruction"], "instruction"), _text(record.get("input") or "", "input")]
    prompt = "\n\n".join(part.strip() for part in parts if part.strip())
    output = _text(record["output"], "output").strip()
    if "{{" in prompt + output:
        return Dropped("unfilled {{placeholder}}")
    system = _text(record.get("system") or "", "system").strip()
    head = [{"role": "system", "content": system}] if system else []
    return Conversation([*head, user(prompt)], output)


def _from_gsm8k(record: dict[str, Any]) -> Conversation | Dropped:
    answer = _text(record["answer"], "answer")
    solution, marker, final = answer.rpartition("####")
    if not marker or not re.fullmatch(r"\s*\$?-?[\d,.]+\s*", final):
        return Dropped("no number after ####")
    # "<<48/2=24>>" are notes to a calculator, not something to say.
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    number = final.strip().lstrip("$")
    reply = f"{solution}\n#### {number}"
    return Conversation(
        [user(_text(record["question"], "question").strip())], reply, checks=json.dumps({"answer": number})
    )


def parse_transcript(text: str) -> list[Message] | None:
    """Turns of an hh-rlhf transcript, or None when text stands before the first turn.

    Turns are cut before chosen and rejected are compared: a comparison by characters puts the opening that both
    replies share into the prompt.
    """
    head, *rest = re.split(r"\n\n(Human|Assistant):", text)
    if head.strip() or not rest:
        return None
    roles = {"Human": user, "Assistant": assistant}
    return [roles[role](content.strip()) for role, content in zip(rest[::2], rest[1::2], strict=True)]


def _from_hh(record: dict[str, Any]) -> Conversation | Dropped:
    chosen = parse_transcript(_text(record["chosen"], "chosen"))
    rejected = parse_transcript(_text(record["rejected"], "rejected"))
    if chosen is None or rejected is None:
        return Dropped("not a transcript")
    if chosen == rejected:
        return Dropped("chosen equals rejected")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return Dropped("last turn is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        return Dropped("prompts differ")
    return Conversation(chosen[:-1], chosen=chosen[-1]["content"], rejected=rejected[-1]["content"])


def _from_preferences(record: dict[str, Any]) -> Conversation | Dropped:
    before, chosen = _reply(record["chosen"], "chosen")
    other, rejected = _reply(record["rejected"], "rejected")
    if isinstance(chosen, Dropped) or isinstance(rejected, Dropped):
        return chosen if isinstance(chosen, Dropped) else rejected  # type: ignore[return-value]
    if before != other:
        return Dropped("prompts differ")
    name = next((name for name in ("prompt", "conversations", "messages") if record.get(name) is not None), None)
    if not before:
        if name is None:
            raise _Malformed("'chosen' and 'rejected' are single replies and there is no 'prompt'")
        before = _prompt(record[name], name)
    scores = [_number(record.get(f"{side}_score", record.get(f"score_{side}"))) for side in ("chosen", "rejected")]
    return Conversation(before, chosen=chosen, rejected=rejected, chosen_score=scores[0], rejected_score=scores[1])


def _number(value: Any) -> float | None:
    try:
        return None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise _Malformed(f"a score is {value!r}, expected a number") from None


CONVERTERS: dict[str, Callable[[dict[str, Any]], Conversation | Dropped]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "gsm8k": _from_gsm8k,
    "hh_rlhf": _from_hh,
    "preferences": _from_preferences,
    "prompt": _from_prompt,
}
