"""Messages in the chat (role, content) and ShareGPT (from, value) formats, with tool calls and their results.

A message becomes ``role`` and ``content``; a message that calls tools also has ``tool_calls``, JSON text. Conversations
are cut into a prompt and the answer that follows it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.final_answers import thought_end
from align.data.formats.fields import CONVERSATIONS, Malformed, Unusable, first, refuse_field, require
from align.data.rows import Dropped, Message, Row, assistant, user

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""The role behind each name that the formats use."""
CALLS = ("function_call", "tool_call")
"""ShareGPT roles whose text is a tool call, as JSON."""

MARKS = ("train", "weight", "loss")
"""Fields of a message that turn training on it on or off, as axolotl, OpenAI and ms-swift write them."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold its thought."""
ALL_UNTRAINED = "every answer is marked not to be trained on"


def is_number(value: Any) -> bool:
    """Return True for a finite number, which counts as its digits where text is expected."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def text(value: Any, name: str) -> str:
    """Return the value as text, a number as its digits. Raises ``Malformed`` for another type."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return str(value)
    raise Malformed(f"'{name}' holds {type(value).__name__}, expected text or a number")


def parse_json(value: Any, name: str) -> Any:
    """Return the parsed JSON of a text field, as CSV and ShareGPT have it; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Malformed(f"'{name}' holds text that is not JSON") from None


def message(value: Any, name: str, options: ReadingOptions) -> Message:
    """Return one message; ``train`` is False if the message is excluded from training.

    Raises ``Malformed`` for another shape, an unknown role or a training mark that align cannot follow, ``Unusable``
    for pictures and sound.
    """
    if not isinstance(value, dict):
        raise Malformed(f"'{name}' holds {type(value).__name__}, expected a message (role, content)")
    role_name = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    role = options.roles.get(str(role_name)) or ROLES.get(str(role_name))
    if role is None:
        names = ", ".join([*options.roles, *ROLES])
        raise Malformed(
            f"'{name}' has a message of role {role_name!r}; known roles: {names}. The source names another with roles: "
            f"{{{role_name}: user}}"
        )
    if role_name in CALLS and str(role_name) not in options.roles:
        parsed_message = assistant("") | {"tool_calls": tool_calls(text(content, f"{name}.value"), name)}
    else:
        parsed_message = _chat_message(value, role, content, name)
    if _is_trained(value, role, name, options) is False and role == "assistant":
        parsed_message["train"] = False
    return parsed_message


def _chat_message(value: dict[str, Any], role: str, content: Any, name: str) -> Message:
    """Return a message with its content, its tool calls, and the fields of a tool's result."""
    parsed_message: Message = {"role": role, "content": ""}
    # OpenAI has a list of calls, and in older data a single ``function_call``.
    calls = value.get("tool_calls") or ([value["function_call"]] if value.get("function_call") else None)
    if calls:
        parsed_message["tool_calls"] = tool_calls(calls, name)
    if content is not None or not calls:
        parsed_message["content"] = _content(content, f"{name}.content")
    for field in ("tool_call_id", "name"):
        if role == "tool" and value.get(field):
            parsed_message[field] = text(value[field], f"{name}.{field}")
    return parsed_message


def _is_trained(value: dict[str, Any], role: str, name: str, options: ReadingOptions) -> bool | None:
    """Return False for a message excluded from training, True for one marked for it, None without any mark."""
    if value.keys().isdisjoint(MARKS):
        return None
    names = [mark for mark in MARKS if not {mark, f"{name}.{mark}"} & set(options.ignore)]
    # Several fields may mark one message; it is trained on only if none of them excludes it.
    marks = {mark: value[mark] for mark in names if value.get(mark) is not None}
    for mark, weight in marks.items():
        if weight not in (0, 1):  # True and False are equal to these
            raise Malformed(
                f"'{name}.{mark}' is {weight!r}, and align trains on a message as a whole or not at all: write true or "
                f"false, or leave it aside with options.ignore: [{mark}]"
            )
        if weight and role != "assistant":
            raise Malformed(
                f"'{name}.{mark}' is {weight!r} in a message of role {role}, and align trains on the assistant's "
                f"messages alone. Take the mark out, or leave all of them aside with options.ignore: [{mark}]"
            )
    return all(marks.values()) if marks else None


def _content(value: Any, name: str) -> str:
    if not isinstance(value, list):
        return text(value, name)
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise Unusable(f"a message with a part of type {kind!s:.40}, and only text is trained")
    return "".join(text(part.get("text"), f"{name}.text") for part in value)


def tool_calls(value: Any, name: str) -> str:
    """Return tool calls in OpenAI's nesting, as JSON text. ``value`` is a list, one call, or either as JSON text."""
    value = parse_json(value, f"{name}.tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Malformed(f"'{name}' has a call of a tool without its name; expected name and arguments")
        raw_arguments = inner.get("arguments", inner.get("parameters"))
        # Arguments may be an object or JSON text. Objects from tables carry None for the fields of other calls.
        arguments = parse_json(raw_arguments, f"{name}.arguments") if raw_arguments else {}
        if not isinstance(raw_arguments, str):
            arguments = without_none(arguments)
        outer = {"id": call["id"]} if call.get("id") else {}
        calls.append({**outer, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return json.dumps(calls, ensure_ascii=False)


def tools(record: dict[str, Any]) -> str:
    """Return the functions that a record offers, as a JSON list in OpenAI's nesting; ``""`` for none."""
    name = first(record, ("tools", "functions"))
    value = parse_json(record[name], name) if name and record[name] not in ("", []) else None
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed(f"'{name}' holds {type(value).__name__}, expected a list of functions")
    nested = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in value
    ]
    return json.dumps(without_none(nested), ensure_ascii=False)


def without_none(value: Any) -> Any:
    """Return nested values without None: tables give the objects of every record the fields of all records."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def messages(value: Any, name: str, options: ReadingOptions) -> list[Message]:
    """Return the messages of a list, or of a list written as JSON text, as CSV has it."""
    value = parse_json(value, name)
    if not isinstance(value, list):
        raise Malformed(f"'{name}' holds {type(value).__name__}, expected a list of messages")
    parsed_messages = [message(item, name, options) for item in value]
    for index, (item, turn) in enumerate(zip(value, parsed_messages, strict=True)):
        # Every thought is read, so with ``last`` thoughts of earlier turns are dropped on purpose.
        thought = read_thought(item, f"{name}.", options)
        if thought and turn["role"] != "assistant":
            refuse_field(f"{name}.{first(item, THOUGHTS)}")
        elif options.thoughts == "all" or index == len(value) - 1:
            turn["content"] = with_thought(turn["content"], thought)
    return parsed_messages


def read_thought(value: dict[str, Any], prefix: str, options: ReadingOptions, fields: Sequence[str] = THOUGHTS) -> str:
    """Return the thought that a message or record has in one of ``fields``; "" for none, or if it is ignored."""
    names = [name for name in fields if not {name, prefix + name} & set(options.ignore)]
    field = first(value, names)
    return "" if field is None else text(value[field], prefix + field).strip()


def with_thought(content: str, thought: str) -> str:
    """Return an answer's text with its thought, as Qwen3 and DeepSeek R1 write it.

    Raises ``Malformed`` if the text begins with another thought.
    """
    if not thought:
        return content
    end = thought_end(content)
    if end and thought not in content[:end]:
        raise Malformed("an answer has a thought in its text and another one in a separate field")
    return content if end else f"<think>\n{thought}\n</think>\n\n{content}"


def parse_conversations(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with lists of messages parsed if they are JSON text."""
    parsed_lists = {}
    for name in CONVERSATIONS:
        if isinstance(record.get(name), str):
            with contextlib.suppress(ValueError):
                parsed_lists[name] = json.loads(record[name])
    return record | parsed_lists


def prompt(value: Any, name: str, options: ReadingOptions) -> list[Message]:
    """Return the messages of a prompt that is text or a list of messages."""
    if isinstance(value, str) or is_number(value):
        return [user(text(value, name))]
    return messages(value, name, options)


def with_system(record: dict[str, Any], turns: list[Message]) -> list[Message]:
    """Return the turns after the system prompt that some formats have in a separate field."""
    name = first(record, ("system", "system_prompt"))
    system = text(record[name], name) if name else ""
    if not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def reply(value: Any, name: str, options: ReadingOptions) -> tuple[list[Message], Message]:
    """Return the turns before the last answer, where ``value`` has any, and the answer, an assistant's message.

    ``value`` is text, one message, or a list of them. Raises ``Unusable`` if the last turn is not the assistant's.
    """
    if isinstance(value, str) or is_number(value):
        return [], assistant(text(value, name))
    turns = messages([value] if isinstance(value, dict) else value, name, options)
    if not turns:
        raise Unusable("empty reply")
    if turns[-1]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    if turns[-1].get("train") is False:
        raise Unusable(ALL_UNTRAINED)
    return turns[:-1], turns[-1]


def lone_reply(value: Any, name: str, options: ReadingOptions) -> Message:
    """Return the answer to a prompt in a separate field. Raises ``Malformed`` if turns come before it."""
    before, answer = reply(value, name, options)
    if before:
        raise Malformed(f"'{name}' holds {len(before) + 1} messages, expected the answer alone")
    return answer


def conversations(turns: list[Message], options: ReadingOptions, kind: str, fields: Row) -> list[Row | Dropped]:
    """Return drafts of a conversation: of its last answer, or of each; of the prompt alone if no answer follows.

    No draft ends in an answer that is excluded from training. Turns after the last answer to train on are dropped,
    since they are not learned. Every draft gets ``fields``.
    """
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    # The conversation ends with a question: it is a prompt.
    if not answers or (options.turns == "last" and answers[-1] != len(turns) - 1):
        return [{"prompt": turns, **fields}]
    if kind == "texts" and any(turn.get("train") is False for turn in turns):
        return [Dropped("a turn is marked not to be trained on")]
    if kind != "prompts":
        # An excluded answer stays in the context of later ones, but no row learns it.
        answers = [index for index in answers if turns[index].get("train") is not False]
    if not answers:
        return [Dropped(ALL_UNTRAINED)]
    if options.turns == "last":
        answers = answers[-1:]
    return [{"prompt": turns[:index], "completion": [turns[index]], **fields} for index in answers]


def from_messages(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert ``messages`` and ``sharegpt``, which differ only in the names of their fields."""
    name = require(record, CONVERSATIONS)
    turns = messages(record[name], name, options)
    if not turns:
        raise Unusable("empty conversation")
    return conversations(with_system(record, turns), options, kind, {"tools": tools(record)})
