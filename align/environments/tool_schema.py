"""JSON schemas of tools, from type hints and docstrings, and a model's arguments held against them.

transformers writes the schemas, as its chat templates read them. It takes a hint that it does not know for an object,
so hints are checked here first.
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
"""Hints that have a schema of their own."""
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
    # Templates write the entire schema into the prompt; what a tool returns is no part of a call.
    shown = {"name": name, "description": schema["description"], "parameters": schema["parameters"]}
    return {"type": "function", "function": shown}


def argument_problem(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the arguments of a call, in a sentence to the model; None where nothing is."""
    function = schema["function"]
    name, parameters = function["name"], function["parameters"]
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
    except Exception as error:  # a name that does not exist, or is imported for type checkers alone
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
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
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
    """Return a function that carries an inherited docstring itself: transformers reads no other."""
    if function.__doc__:
        return function
    plain = inspect.unwrap(getattr(function, "__func__", function))
    copy = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__annotations__, copy.__kwdefaults__ = plain.__annotations__, plain.__kwdefaults__
    copy.__doc__ = inspect.getdoc(function)
    return copy


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _value_problem(schema: Mapping[str, Any], value: Any) -> str | None:
    """Return what a value should be in place of what it is; None where it fits."""
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
