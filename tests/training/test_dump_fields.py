"""What is dumped of a dataclass's fields: type as text, choices and plain defaults."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, Union

import pytest

from align.training.dump_fields import class_fields, dump_classes

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


def test_a_class_that_is_not_there_is_told_from_one_that_fails() -> None:
    dump = dump_classes("no_such:Name", "json.gone:Name", "json:Name", f"{__name__}:Resolved")
    assert dump.classes["no_such:Name"] == "there is no module no_such."
    assert dump.classes["json.gone:Name"] == "json has no file gone.py."
    expected = "json/__init__.py has no class Name; this version of json is not one align knows."
    assert str(dump.classes["json:Name"]).endswith(expected)
    assert dump.classes[f"{__name__}:Resolved"] == class_fields(Resolved)
    assert not dump.errors


def test_the_command_prints_what_it_would_write(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from dataclasses import dataclass\nprint('imported')\n@dataclass\nclass Arguments:\n    patience: int = 3\n"
    )
    command = [sys.executable, "-m", "align.training.dump_fields", "theirs:Arguments"]
    environment = {"PYTHONPATH": ":".join([str(Path.cwd()), str(tmp_path)])}
    written = tmp_path / "dump.json"
    subprocess.run([*command, str(written)], check=True, env=environment)
    printed = subprocess.run([*command, "-"], check=True, env=environment, capture_output=True, text=True).stdout
    assert printed.splitlines()[0] == "imported"
    assert json.loads(printed.splitlines()[1]) == json.loads(written.read_text())
    expected = {"patience": {"type": "int", "default": 3}}
    assert json.loads(written.read_text()) == {"classes": {"theirs:Arguments": expected}, "errors": {}}
