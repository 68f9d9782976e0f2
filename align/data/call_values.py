"""Read one tool call: from a JSON value, or from code in Python's syntax. Torch-free.

Whatever a model wrote ends in calls or in a ``MalformedCall``, whose message is for the model. Arguments are values
that any JSON file can hold.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import shorten, with_article

LONGEST_CODE = 20_000
"""Characters of calls in Python's syntax that are parsed."""
SYNTAX_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as a model wrote it."""

    name: str
    arguments: dict[str, Any]
    text: str
    """The raw text of the call."""
    id: str = ""
    """The call's own id, in formats whose results repeat it."""


class MalformedCall(ValueError):
    """A call that cannot be read; the message is a sentence for the model."""


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value at ``start``, behind white space, and the place after it.

    Raises ``MalformedCall`` for anything else, and for numbers and characters that no JSON file can hold.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        # An escape may hold half of a character. It decodes without an error, and only encoding it again fails.
        value, end = _DECODER.raw_decode(text, start)
        # A number such as 1e999 decodes to infinity, which no JSON file holds.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        raise MalformedCall(f"is no valid JSON ({error.msg} at character {error.pos - start})") from None
    except UnicodeEncodeError:
        raise MalformedCall("has half of a character (a lone surrogate)") from None
    except RecursionError:
        raise MalformedCall("is nested too deeply") from None
    except ValueError as error:
        raise MalformedCall(f"is no valid JSON ({shorten(str(error))})") from None
    return value, end


def decode_whole(text: str, start: int) -> Any:
    """Return the JSON value at ``start``. Raises ``MalformedCall`` for anything else, also for text after the value."""
    value, end = decode_json(text, start)
    if text[end:].strip():
        raise MalformedCall("has text after its JSON")
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def call_from_json(entry: Any, raw: str) -> ToolCall:
    """Return the call that a JSON value describes; ``raw`` is its text.

    Raises ``MalformedCall`` for a value without name or arguments.
    """
    if isinstance(entry, Mapping) and isinstance(entry.get("function"), Mapping):  # OpenAI's nesting
        entry = {"id": entry.get("id"), **entry["function"]}
    if not isinstance(entry, Mapping):
        raise MalformedCall(f"is {with_article(_json_type(entry))}, not an object")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise MalformedCall('has no "name"')
    key = "arguments" if "arguments" in entry else "parameters"
    if key not in entry:
        raise MalformedCall(f'of {shorten(name)} has no "arguments"')
    arguments = entry[key]
    if isinstance(arguments, str):  # some models write the object as text
        arguments, _ = decode_json(arguments, 0)
    if not isinstance(arguments, dict):
        raise MalformedCall(
            f'of {shorten(name)} has "{key}" that is {with_article(_json_type(arguments))}, not an object'
        )
    return ToolCall(name, arguments, raw, str(entry.get("id") or ""))


def _json_type(value: Any) -> str:
    names = {list: "list", str: "text", bool: "truth value", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def calls_from_code(code: str) -> Iterator[ToolCall]:
    """Yield the calls of a block in Python's syntax; JSON's ``true``, ``false`` and ``null`` are also values.

    Raises ``MalformedCall`` for anything but calls with named arguments of plain values.
    """
    if len(code) > LONGEST_CODE:
        raise MalformedCall(f"has over {LONGEST_CODE} characters")
    lines = textwrap.dedent(code).strip()
    try:
        # The code is parsed and never run.
        body = ast.parse(lines).body
    except SYNTAX_ERRORS as error:
        raise MalformedCall(f"is no call in Python's syntax ({shorten(str(error))})") from None
    if not body:
        raise MalformedCall("is empty")
    for statement in body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call):
            raise MalformedCall("is no call of a function")
        name = _dotted_name(call.func)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise MalformedCall(f"of {shorten(name)} has arguments without a name")
        arguments = {str(keyword.arg): _literal(keyword.value, name) for keyword in call.keywords}
        yield ToolCall(name, arguments, ast.get_source_segment(lines, statement) or lines)


def _dotted_name(node: ast.expr) -> str:
    """Return ``a.b.c`` of the code that names a function. Raises ``MalformedCall`` for any other code."""
    # In a loop: a model that repeats itself writes chains that are too deep for a function that calls itself.
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise MalformedCall("does not name a function")
    return ".".join([node.id, *reversed(parts)])


_CONSTANTS = {"true": True, "false": False, "null": None}


class _JsonNames(ast.NodeTransformer):
    """Turns JSON's ``true``, ``false`` and ``null`` into Python's constants."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Replace a name of JSON."""
        if node.id not in _CONSTANTS:
            return node
        return ast.copy_location(ast.Constant(_CONSTANTS[node.id]), node)


def _literal(node: ast.expr, name: str) -> Any:
    try:
        value = ast.literal_eval(_JsonNames().visit(node))
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (*SYNTAX_ERRORS, TypeError):
        raise MalformedCall(f"of {shorten(name)} has an argument that is no plain value") from None
    return json.loads(text)  # a tuple is a list in JSON
