"""Align's own rows in files: ``format: rows`` reads what a build or a generator of rows wrote, with all columns."""

from __future__ import annotations

import json
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import Malformed
from align.data.rows import Dropped, Row

CONVERSATIONS = ("prompt", "completion", "chosen", "rejected")
TEXTS = ("id", "source", "checks", "tools", "text")
ROLES = ("system", "user", "assistant", "tool")


def from_rows(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Return the record as it is. Raises ``Malformed`` for fields of a row that hold something else than rows have."""
    row = {name: value for name, value in dict(record).items() if value is not None}
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            row[name] = [_with_calls_as_text(message) for message in row[name]]
    for name in TEXTS:
        if name in row and not isinstance(row[name], str):
            if name != "checks" or not isinstance(row[name], dict):
                raise Malformed(f"'{name}' holds {type(row[name]).__name__}, expected text")
            row["checks"] = json.dumps(row["checks"], ensure_ascii=False)
    for name in CONVERSATIONS:
        if name in row:
            _check_messages(row[name], name)
    if "responses" in row:
        _check_responses(row["responses"])
    internal = next((name for name in row if name.startswith("_")), None)
    if internal is not None:
        raise Malformed(f"'{internal}' begins with _, as align's internal fields do")
    return [row]


def _with_calls_as_text(message: Any) -> Any:
    """Return a message with its calls as JSON text; OpenAI's files have a list of them."""
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": json.dumps(message["tool_calls"], ensure_ascii=False)}


def _check_messages(value: Any, name: str) -> None:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Malformed(
            f"'{name}' holds {type(value).__name__}, and rows have lists of messages (role, content) there; records "
            "with texts have another format, such as prompt_completion"
        )
    for message in value:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise Malformed(f"'{name}' has a message without a role ({', '.join(ROLES)}) or without its content")
        for field in ("tool_calls", "tool_call_id", "name"):
            if not isinstance(message.get(field, ""), str | None):
                raise Malformed(f"'{name}' has a message whose {field} holds {type(message[field]).__name__}, not text")
        if not isinstance(message.get("train"), bool | None):
            raise Malformed(f"'{name}' has a message whose train is {message['train']!r}, not true or false")


def _check_responses(value: Any) -> None:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("content"), str) for item in value
    ):
        raise Malformed("'responses' holds something else than a list of answers, each with its text as content")
