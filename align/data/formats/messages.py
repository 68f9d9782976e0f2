"""Messages in chat (role, content) and ShareGPT (from, value) spelling, with calls of tools and their results.

A message becomes ``role`` and ``content``; one that calls tools also has ``tool_calls``, JSON text. Conversations are
cut into a prompt and the answer behind it.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from align.data.formats.fields import CONVERSATIONS, Malformed, Unusable, first
from align.data.formats.options import FormatOptions
from align.data.rows import Dropped, Message, Row, assistant, user

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool",
    "tool_response": "tool", "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")
"""ShareGPT roles whose text is a call, as JSON."""


MARKS = ("train", "weight", "loss")
"""Fields of a message that say whether it is trained on, as axolotl, OpenAI and ms-swift write them."""
_MARKS = frozenset(MARKS)
ALL_UNTRAINED = "every answer is marked not to be trained on"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which stands for its digits where text is expected."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def text(value: Any, name: str) -> str:
    """The value as text, a number as its digits; raises ``Malformed`` for another type."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return str(value)
    raise Malformed(f"'{name}' holds {type(value).__name__}, expected text or a number")


def parsed(value: Any, name: str) -> Any:
    """JSON that stands in a text field, as CSV and ShareGPT have it; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Malformed(f"'{name}' holds text that is not JSON") from None


def message(value: Any, name: str, options: FormatOptions) -> Message:
    """One message; ``train`` is False in one that is marked not to be trained on.

    Raises ``Malformed`` for another shape, an unknown role or a mark that cannot be honored, ``Unusable`` for pictures
    and sound.
    """
    if not isinstance(value, dict):
        raise Malformed(f"'{name}' holds {type(value).__name__} where a message (role, content) was expected")
    spelled = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    role = options.roles.get(str(spelled)) or ROLES.get(str(spelled))
    if role is None:
        known = ", ".join([*options.roles, *ROLES])
        raise Malformed(
            f"'{name}' has a message of role {spelled!r}; known roles: {known}. options.roles can name another"
        )
    if spelled in CALLS and str(spelled) not in options.roles:
        marked = {"train": False} if _is_trained(value, role, name, options) is False else {}
        return assistant("") | {"tool_calls": calls(text(content, f"{name}.value"), name)} | marked
    found: Message = {"role": role, "content": ""}
    given = value.get("tool_calls") or ([value["function_call"]] if value.get("function_call") else None)
    if given:
        found["tool_calls"] = calls(given, name)
    if content is not None or not given:
        found["content"] = _content(content, f"{name}.content")
    for more in ("tool_call_id", "name"):
        if role == "tool" and value.get(more):
            found[more] = text(value[more], f"{name}.{more}")
    if _is_trained(value, role, name, options) is False and role == "assistant":
        found["train"] = False
    return found


def _is_trained(value: dict[str, Any], role: str, name: str, options: FormatOptions) -> bool | None:
    """What a message's mark says; None where it has none."""
    if _MARKS.isdisjoint(value):
        return None
    honored = [mark for mark in MARKS if not {mark, f"{name}.{mark}"} & set(options.ignore)]
    marks = {mark: value[mark] for mark in honored if value.get(mark) is not None}
    for mark, said in marks.items():
        if said not in (0, 1):  # True and False are equal to these
            raise Malformed(
                f"'{name}.{mark}' is {said!r}, and align trains on a message as a whole or not at all: write true or "
                f"false, or leave it aside with options.ignore: [{mark}]"
            )
        if said and role != "assistant":
            raise Malformed(
                f"'{name}.{mark}' is {said!r} in a message of role {role}, and align trains on the assistant's "
                f"messages alone. Take the mark out, or leave all of them aside with options.ignore: [{mark}]"
            )
    return all(marks.values()) if marks else None


def _content(value: Any, name: str) -> str:
    if not isinstance(value, list):
        return text(value, name)
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise Unusable("a message that is not all text")
    return "".join(text(part.get("text"), f"{name}.text") for part in value)


def calls(value: Any, name: str) -> str:
    """Calls of tools in OpenAI's nesting, as JSON text; taken from a list, from one call, or from either as text."""
    value = parsed(value, f"{name}.tool_calls")
    made = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Malformed(f"'{name}' has a call of a tool without its name; expected name and arguments")
        given = inner.get("arguments", inner.get("parameters"))
        arguments = parsed(given, f"{name}.arguments") if given else {}
        if not isinstance(given, str):
            arguments = without_none(arguments)
        outer = {"id": call["id"]} if call.get("id") else {}
        made.append({**outer, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return json.dumps(made, ensure_ascii=False)


def tools(record: dict[str, Any]) -> str:
    """The functions a record offers, as a JSON list in OpenAI's nesting; ``""`` for none."""
    name = first(record, ("tools", "functions"))
    value = parsed(record[name], name) if name and record[name] not in ("", []) else None
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed(f"'{name}' holds {type(value).__name__}, expected a list of functions")
    made = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in value
    ]
    return json.dumps(without_none(made), ensure_ascii=False)


def without_none(value: Any) -> Any:
    """Nested values without None: tables give every record's objects the fields of all the others."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def messages(value: Any, name: str, options: FormatOptions) -> list[Message]:
    """A list of messages, or one written as JSON text, as CSV has it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Malformed(f"'{name}' holds text where a list of messages was expected") from None
    if not isinstance(value, list):
        raise Malformed(f"'{name}' holds {type(value).__name__} where a list of messages was expected")
    return [message(item, name, options) for item in value]


def with_conversations_parsed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with lists of messages where it has them as JSON text."""
    parsed_lists = {}
    for name in CONVERSATIONS:
        if isinstance(record.get(name), str):
            with contextlib.suppress(ValueError):
                parsed_lists[name] = json.loads(record[name])
    return record | parsed_lists


def prompt(value: Any, name: str, options: FormatOptions) -> list[Message]:
    """A prompt that is text or a list of messages."""
    if isinstance(value, str) or is_number(value):
        return [user(text(value, name))]
    return messages(value, name, options)


def with_system(record: dict[str, Any], found: list[Message]) -> list[Message]:
    """The messages behind the system prompt that some formats keep in a field of its own."""
    name = first(record, ("system", "system_prompt"))
    words = text(record[name], name) if name else ""
    if not words.strip() or (found and found[0]["role"] == "system"):
        return found
    return [{"role": "system", "content": words}, *found]


def reply(value: Any, name: str, options: FormatOptions) -> tuple[list[Message], Message]:
    """What comes before the last answer, where ``value`` has it, and the answer, an assistant's message.

    ``value`` is text, one message, or a list of them. Raises ``Unusable`` where the last turn is another's.
    """
    if isinstance(value, str) or is_number(value):
        return [], assistant(text(value, name))
    found = [message(value, name, options)] if isinstance(value, dict) else messages(value, name, options)
    if not found:
        raise Unusable("empty reply")
    if found[-1]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    if found[-1].get("train") is False:
        raise Unusable(ALL_UNTRAINED)
    return found[:-1], found[-1]


def conversations(found: list[Message], options: FormatOptions, kind: str, more: Row) -> list[Row | Dropped]:
    """Drafts of a conversation: of its last answer, or of each; without an answer behind it, of its prompt alone.

    An answer that is marked not to be trained on ends no draft. What comes behind the last answer that may be trained
    on is left out, since nothing of it is learned.
    """
    ends = [at for at, turn in enumerate(found) if turn["role"] == "assistant"]
    if not ends or (options.turns == "last" and ends[-1] != len(found) - 1):
        return [{"prompt": found, **more}]
    if kind == "texts" and any(turn.get("train") is False for turn in found):
        return [Dropped("a turn is marked not to be trained on")]
    if kind != "prompts":
        ends = [at for at in ends if found[at].get("train") is not False]
    if not ends:
        return [Dropped(ALL_UNTRAINED)]
    if options.turns == "last":
        ends = ends[-1:]
    return [{"prompt": found[:end], "completion": [found[end]], **more} for end in ends]


def from_messages(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """Formats ``messages`` and ``sharegpt``, which differ in spelling alone."""
    name = first(record, CONVERSATIONS)
    assert name is not None
    found = messages(record[name], name, options)
    if not found:
        raise Unusable("empty conversation")
    return conversations(with_system(record, found), options, kind, {"tools": tools(record)})
