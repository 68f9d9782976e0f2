"""JSON schemas of tools from type hints and docstrings, and the check of a model's arguments against them.

transformers writes the schemas, because its chat templates read them. It converts an unknown hint to an object, so
hints are checked here first.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from align.config.validation import hint_nearest
from align.errors import UserError, shorten

PLAIN = (str, int, float, bool, type(None), Any, list, dict, tuple)
"""Hints with a JSON schema."""
CONTAINERS = (list, dict, tuple)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
WORDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def tool_schema(function: Callable[..., Any], name: str, place: str) -> dict[str, Any]:
    """Return the JSON schema of a function or method that a model may call as ``name``.

    Raises ``UserError``, which begins with ``place``, for a function without docstring, for an argument without type
    hint or description, and for a hint that has no JSON schema.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    where = f"{place}: tool '{name}'"
    _check_hints(function, where)
    if not (inspect.getdoc(function) or "").strip():
        raise UserError(f"{where} has no docstring; the model learns from it what the tool does.")
    try:
        schema = get_json_schema(_with_docstring(function))["function"]
    except DocstringParsingException as error:
        raise UserError(
            f"{where}: {_first_sentence(error)} Describe each argument in the docstring, below a line `Args:`, as "
            "`name: what it means`."
        ) from None
    except TypeHintParsingException as error:
        raise UserError(f"{where}: {_first_sentence(error)}") from None
    # Templates write the complete schema into the prompt, and the return value is not part of a call.
    shown = {"name": name, "description": schema["description"], "parameters": schema["parameters"]}
    return {"type": "function", "function": shown}


def argument_problem(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Return the error in a call's arguments as a sentence for the model; None if they are correct."""
    function = schema["function"]
    name = function["name"]
    parameters = function["parameters"]
    properties = parameters.get("properties", {})
    unknown = [argument for argument in arguments if argument not in properties]
    missing = [argument for argument in parameters.get("required", ()) if argument not in arguments]
    if unknown and not parameters.get("additionalProperties"):
        hint = hint_nearest(unknown[0], properties) or f" It takes {', '.join(properties) or 'no arguments'}."
        return f"{name} has no argument '{shorten(unknown[0])}'.{hint}"
    if missing:
        return f"{name} needs the argument '{missing[0]}'."
    for argument, value in arguments.items():
        problem = _value_problem(properties.get(argument, {}), value)
        if problem is not None:
            return f"{name}: the argument '{argument}' should be {problem}; it is {shorten(repr(value))}."
    return None


def _check_hints(function: Callable[..., Any], where: str) -> None:
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception as error:  # a name that does not exist, or is imported only for type checkers
        raise UserError(f"{where}: its type hints cannot be read ({type(error).__name__}: {error}).") from None
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        parameters = parameters[1:]
    for parameter in parameters:
        if parameter.kind not in NAMED:
            shown = str(parameter.replace(annotation=inspect.Parameter.empty))
            raise UserError(f"{where} takes '{shown}', which has no JSON schema; name each argument.")
        if parameter.name not in hints:
            raise UserError(
                f"{where}: the argument '{parameter.name}' has no type hint; write `{parameter.name}: str`."
            )
        _check_hint(hints[parameter.name], parameter.name, where)


def _check_hint(hint: Any, argument: str, where: str) -> None:
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is typing.Literal:
        if all(isinstance(value, str | int | float | bool | None) for value in inner):
            return
    elif origin in CONTAINERS or origin in (typing.Union, types.UnionType):
        for part in inner:
            _check_hint(part, argument, where)
        return
    elif hint in PLAIN:
        return
    name = getattr(hint, "__name__", None) if origin is None else None
    raise UserError(
        f"{where}: the type hint of '{argument}', {name or hint}, has no JSON schema; use str, int, float, bool, list, "
        "dict or Literal."
    )


def _with_docstring(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with its inherited docstring, which transformers does not look up."""
    if function.__doc__:
        return function
    inner = inspect.unwrap(getattr(function, "__func__", function))
    copy = types.FunctionType(inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__annotations__ = inner.__annotations__
    copy.__kwdefaults__ = inner.__kwdefaults__
    copy.__doc__ = inspect.getdoc(function)
    return copy


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _value_problem(schema: Mapping[str, Any], value: Any) -> str | None:
    """Return a description of the expected value; None if the value is valid."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        problems = [_value_problem(choice, value) for choice in schema["anyOf"]]
        if None in problems:
            return None
        return " or ".join(problem for problem in problems if problem is not None)
    if "enum" in schema:
        return None if value in schema["enum"] else f"one of {', '.join(map(repr, schema['enum']))}"
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is_of_kind(value, kind) for kind in kinds):
        return " or ".join(WORDS.get(kind, kind) for kind in kinds)
    items = schema.get("items")
    if items and isinstance(value, list):
        problems = [_value_problem(items, item) for item in value]
        problem = next((problem for problem in problems if problem is not None), None)
        return None if problem is None else f"a list, each item {problem}"
    return None


def _is_of_kind(value: Any, kind: str) -> bool:
    # In Python True is an integer. In JSON it is not.
    if isinstance(value, bool) or kind == "boolean":
        return kind == "boolean" and isinstance(value, bool)
    types_of_kind: dict[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "array": list,
        "object": dict,
        "null": type(None),
    }
    return kind not in types_of_kind or isinstance(value, types_of_kind[kind])
