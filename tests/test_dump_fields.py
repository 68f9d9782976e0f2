"""What is dumped of a dataclass's fields: type as text, choices and plain defaults."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, Union

import pytest

from tools.dump_fields import class_fields

if TYPE_CHECKING:
    from decimal import Decimal


class Color(enum.StrEnum):
    RED = "red"


@dataclass
class Resolved:
    number: int
    share: float = 0.5
    name: Optional[str] = None  # noqa: UP045
    names: Union[str, list[str]] = field(default_factory=list)  # noqa: UP007
    table: dict[str, Any] | str | None = None
    color: Color | str = Color.RED
    mode: Literal["a", "b"] = "a"
    maybe: Literal["a", "b"] | None = None
    level: Literal["auto"] | int | bool = "auto"
    call: Callable[[int, str], bool] | None = None
    pair: tuple[int, ...] = (1, 2)
    listed: str = field(default="x", metadata={"choices": {"x": 1, "y": 2}.keys()})
    odd: float = float("nan")
    constant: ClassVar[int] = 3
    derived: int = field(init=False, default=0)
    _hidden: int = 0


@dataclass
class Unresolved:
    exact: Decimal | None = None
    patience: int | None = None


def test_fields_of_a_class() -> None:
    assert class_fields(Resolved) == {
        "number": {"type": "int"},
        "share": {"type": "float", "default": 0.5},
        "name": {"type": "str | None", "default": None},
        "names": {"type": "list[str] | str"},
        "table": {"type": "dict[str, Any] | str | None", "default": None},
        "color": {"type": "Color | str", "default": "red"},
        "mode": {"type": "Literal['a', 'b']", "choices": ["a", "b"], "default": "a"},
        "maybe": {"type": "Literal['a', 'b'] | None", "choices": ["a", "b", None], "default": None},
        "level": {"type": "bool | int | str", "default": "auto"},
        "call": {"type": "Callable[[int, str], bool] | None", "default": None},
        "pair": {"type": "tuple[int, ...]", "default": [1, 2]},
        "listed": {"type": "str", "choices": ["x", "y"], "default": "x"},
        "odd": {"type": "float"},
    }
    assert class_fields(Resolved).keys() == {f.name for f in dataclasses.fields(Resolved) if f.init} - {"_hidden"}


def test_types_that_only_checkers_know_stay_as_they_are_written() -> None:
    with pytest.raises(NameError):
        typing.get_type_hints(Unresolved)
    assert class_fields(Unresolved) == {
        "exact": {"type": "Decimal | None", "default": None},
        "patience": {"type": "int | None", "default": None},
    }
