"""Options that a class in another package accepts, and the check of an option's value. Torch-free.

The options are the class's real fields, which ``field_dumps`` has. Rules across fields are left to the class itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from align.config.validation import hint_nearest

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
        """Return whether ``value`` has a type that the annotation names; True if it names any type but plain ones."""
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


def refuse_unknown_option(name: str, known: Iterable[str], owner: str) -> None:
    """Raise ``ValueError`` with the nearest name if ``name`` is not among the ``known`` options of ``owner``."""
    if name not in known:
        raise ValueError(f"unknown key '{name}': {owner} has no such option.{hint_nearest(name, known)}")


def _split_union(annotation: str) -> list[str]:
    """Split ``dict[str, Any] | str | None`` at the bars outside brackets."""
    members, depth, start = [], 0, 0
    for index, char in enumerate(annotation):
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            members.append(annotation[start:index])
            start = index + 1
    return [*members, annotation[start:]]
