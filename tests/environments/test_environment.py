"""Schemas of tools: what the model is told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from align.environments.environment import argument_problem, tool_schema
from align.errors import UserError


def look(place: str, times: int = 1, way: Literal["near", "far"] | None = None, more: list[float] | None = None) -> str:
    """Look at a place.

    Args:
        place: Where
            to look.
        times: How often.
        way: How far.
        more: Numbers.

    Returns:
        What is there.
    """
    return place


def test_a_schema_holds_what_the_docstring_and_the_hints_say() -> None:
    assert tool_schema(look, "look", "environment") == {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Where to look."},
                    "times": {"type": "integer", "description": "How often."},
                    "way": {
                        "type": "string", "enum": ["near", "far"], "nullable": True, "description": "How far.",
                    },
                    "more": {
                        "type": "array", "items": {"type": "number"}, "nullable": True, "description": "Numbers.",
                    },
                },
                "required": ["place"],
            },
        },
    }  # fmt: skip


class Base:
    def look(self, place: str) -> str:
        """Look.

        Args:
            place: Where.
        """
        return place


class Derived(Base):
    def look(self, place: str) -> str:
        return place * 2


def test_a_docstring_may_be_inherited() -> None:
    assert tool_schema(Derived.look, "look", "environment") == tool_schema(Base.look, "look", "environment")


def without_docstring(place: str) -> str:
    return place


def without_description(place: str) -> str:
    """Look."""
    return place


def without_hint(place) -> str:  # type: ignore[no-untyped-def]
    """Look.

    Args:
        place: Where.
    """
    return str(place)


def odd_hint(place: complex) -> str:
    """Look.

    Args:
        place: Where.
    """
    return str(place)


def nested_hint(place: list[dict[str, bytes]]) -> str:
    """Look.

    Args:
        place: Where.
    """
    return str(place)


def unknown_hint(place: NoSuchType) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Look.

    Args:
        place: Where.
    """
    return str(place)


def many(*places: str) -> str:
    """Look."""
    return ""


def any_named(**places: str) -> str:
    """Look."""
    return ""


def by_position(place: str, /) -> str:
    """Look."""
    return ""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (without_docstring, "has no docstring"),
        (without_description, "no description for the argument 'place'. Describe each argument in the docstring"),
        (without_hint, "the argument 'place' has no type hint; write `place: str`."),
        (odd_hint, "the type hint of 'place', complex, has no JSON schema; use str, int,"),
        (nested_hint, "the type hint of 'place', bytes, has no JSON schema"),
        (unknown_hint, "its type hints cannot be read (NameError: name 'NoSuchType' is not defined)"),
        (many, "takes '*places', which has no JSON schema; name each argument"),
        (any_named, "takes '**places', which has no JSON schema"),
        (by_position, "takes 'place', which has no JSON schema"),
    ],
)
def test_a_function_without_a_schema_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tool_schema(function, function.__name__, "environment.tools[1]")
    text = str(caught.value)
    assert text.startswith(f"environment.tools[1]: tool '{function.__name__}'") and message in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"place": "a"}, None),
        ({"place": "a", "times": 2, "way": "far", "more": [1, 2.5]}, None),
        ({"place": "a", "way": None, "more": None}, None),
        ({}, "look needs the argument 'place'."),
        ({"plase": "a"}, "look has no argument 'plase'. Did you mean 'place'?"),
        ({"place": "a", "x": "a"}, "look has no argument 'x'. It takes place, times, way, more."),
        ({"place": 3}, "look: the argument 'place' should be a text; it is 3."),
        ({"place": "a", "times": 1.5}, "look: the argument 'times' should be a whole number; it is 1.5."),
        ({"place": "a", "times": True}, "look: the argument 'times' should be a whole number; it is True."),
        ({"place": "a", "times": None}, "look: the argument 'times' should be a whole number; it is None."),
        ({"place": "a", "way": "up"}, "look: the argument 'way' should be one of 'near', 'far'; it is 'up'."),
        ({"place": "a", "more": ["b"]}, "look: the argument 'more' should be a list, each item a number; it is ['b']."),
    ],
)  # fmt: skip
def test_the_model_is_told_what_is_wrong_with_its_arguments(arguments: dict[str, Any], problem: str | None) -> None:
    assert argument_problem(tool_schema(look, "look", ""), arguments) == problem


def either(value: int | list[int] | str) -> str:
    """Take one of several.

    Args:
        value: What.
    """
    return str(value)


def test_one_of_several_types_is_enough() -> None:
    schema = tool_schema(either, "either", "")
    assert [argument_problem(schema, {"value": value}) for value in (1, [1], "a")] == [None] * 3
    problem = argument_problem(schema, {"value": {}})
    assert problem is not None and "a whole number" in problem and "a text" in problem
