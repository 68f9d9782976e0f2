"""Fields of the classes in trl, transformers and peft that options go to, as the tested versions have them. Torch-free.

Importing those classes needs torch and several seconds, so ``field_dumps.json`` next to this module has their fields
(``tools/dump_fields.py`` writes it). For other versions, and for a user's class, only the class itself can check its
options: it does when its stage starts.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_suffix(".json")
"""The dumps ``trainers`` and ``peft`` of the versions in constraints.txt."""
TRAINERS = "trainers"
PEFT = "peft"
"""The dump of every class that a stage of align names, and the dump of peft's config classes by method."""


_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class Option:
    """One field of a class, with its type as text and the choices that its metadata or type lists."""

    name: str
    annotation: str
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` has a type that the annotation names; True if it names a type that is not plain."""
        # Only the outer type is checked: ``list[int]`` accepts any list.
        names = [part.strip().split("[")[0] for part in _split_union(self.annotation)]
        if any(name not in _PLAIN_TYPES for name in names):
            return True
        if isinstance(value, bool):  # a bool is an int in Python, but not for the author of a YAML file
            return "bool" in names
        return any(isinstance(value, _PLAIN_TYPES[name]) for name in names)

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` for a value of the wrong type or outside the choices."""
        if not self.accepts(value):
            raise ValueError(f"'{self.name}' should be {self.annotation}; found {value!r}.")
        # trl and transformers list the choices of ``str | None`` without None.
        is_left_open = value is None and "None" in map(str.strip, _split_union(self.annotation))
        if self.choices and not is_left_open and value not in self.choices:
            raise ValueError(f"'{self.name}' should be one of {', '.join(map(repr, self.choices))}; found {value!r}.")


def _split_union(annotation: str) -> list[str]:
    """Split ``dict[str, Any] | str | None`` at the bars outside brackets."""
    members = []
    depth = 0
    start = 0
    for index, char in enumerate(annotation):
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            members.append(annotation[start:index])
            start = index + 1
    return [*members, annotation[start:]]


@functools.cache
def shipped_fields() -> dict[str, Any]:
    """Return the shipped dumps by name, each with its ``versions`` and the fields of its ``classes``."""
    dumps: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return dumps


@functools.cache
def class_options(path: str) -> dict[str, Option] | None:
    """Return every field of the class ``path`` (``package.module:Name``) by name, including inherited fields.

    None for a user's class, and if the installed versions are not the tested ones.
    """
    return _options(TRAINERS, path)


def method_options(kind: str) -> dict[str, Option] | None:
    """Return every field of peft's config class for ``kind`` by name; None if the installed peft is not the tested."""
    return _options(PEFT, kind)


def _options(dump: str, name: str) -> dict[str, Option] | None:
    shipped = shipped_fields()[dump]
    if name not in shipped["classes"] or any(_installed_version(p) != v for p, v in shipped["versions"].items()):
        return None
    return {
        option: Option(option, description["type"], tuple(description.get("choices", ())))
        for option, description in shipped["classes"][name].items()
    }


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
