"""Templates over the fields of a record: ``{question}``, ``{choices[0].text}``; ``str.format`` over only data.

A path leads through mappings and lists. It never reaches an attribute of a Python object, and has no conversions and no
format specifications. So a recipe's template can only quote the data. ``{context?}`` is empty if a record has no such
value; ``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Step = str | int
"""A name in a mapping, or an index of a list."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")
_FIRST = re.compile(r"[^.\[\]]+")
_INDEX = re.compile(r"-?\d+")


class MissingValue(ValueError):
    """A record lacks a value that a template needs, or the value is not text."""


@dataclass(frozen=True)
class Reference:
    """A field of a template."""

    text: str
    """The path as it is written, without braces."""
    steps: tuple[Step, ...]
    is_optional: bool = False

    @property
    def column(self) -> str:
        """The record's field that the path begins with."""
        return str(self.steps[0])


@dataclass(frozen=True)
class Template:
    """Texts and fields, in order."""

    parts: tuple[str | Reference, ...]

    @property
    def references(self) -> list[Reference]:
        """The fields, in order."""
        return [part for part in self.parts if isinstance(part, Reference)]

    @property
    def is_single(self) -> bool:
        """True for a template that is only a field, whose value may be a list or a mapping."""
        return len(self.parts) == 1 and isinstance(self.parts[0], Reference)

    def value(self, record: Mapping[str, Any]) -> Any:
        """Return the value of a single field as it is, or None without a value; the text of any other template."""
        if self.is_single:
            return lookup(self.references[0], record)
        return self.render(record)

    def render(self, record: Mapping[str, Any]) -> str:
        """Return the text. Raises ``MissingValue`` for a field that the record lacks, and for a list or a mapping."""
        return "".join(part if isinstance(part, str) else _text(part, record) for part in self.parts)


@lru_cache(maxsize=1024)
def parse_template(text: str) -> Template:
    """Return the template of a text. Raises ``ValueError`` for a brace that belongs to no field, and for a bad path."""
    parts: list[str | Reference] = []
    literal = ""
    start = 0
    for match in _FIELD.finditer(text):
        literal += text[start : match.start()]
        start = match.end()
        token = match.group()
        if token in ("{{", "}}"):
            literal += token[0]
            continue
        if len(token) == 1:
            raise ValueError(f"'{text}' has a single '{token}'; write a field as {{name}}, and a brace as {token * 2}")
        if literal:
            parts.append(literal)
            literal = ""
        parts.append(_parse_reference(match.group(1), text))
    literal += text[start:]
    if literal or not parts:
        parts.append(literal)
    return Template(tuple(parts))


@lru_cache(maxsize=1024)
def parse_column(text: str) -> Template:
    """Return the template of a column's setting: a plain name is a column, anything with braces a template."""
    if "{" in text or "}" in text:
        return parse_template(text)
    return Template((Reference(text, (text,)),))


def _parse_reference(inside: str, template: str) -> Reference:
    path = inside.removesuffix("?")
    if "!" in path or re.search(r":[^ ]*$", path):
        raise ValueError(f"'{{{inside}}}' in '{template}' has a conversion or a format; a field is only a path")
    first = _FIRST.match(path)
    if first is None or not path.strip():
        raise ValueError(f"'{{{inside}}}' in '{template}' is not a field; write {{name}}, {{name[0]}} or {{name.key}}")
    steps: list[Step] = [first.group()]
    place = first.end()
    while place < len(path):
        match = _STEP.match(path, place)
        if match is None:
            raise ValueError(
                f"'{{{inside}}}' in '{template}' is not a path; a list's item is [0], a mapping's value .key or [key]"
            )
        name, key = match.groups()
        steps.append(int(key) if key is not None and _INDEX.fullmatch(key) else name or key)
        place = match.end()
    return Reference(path, tuple(steps), inside.endswith("?"))


def lookup(reference: Reference, record: Mapping[str, Any]) -> Any:
    """Return the value that a path leads to; None if the record ends before it.

    A field whose name is the whole path takes precedence. JSON text is parsed if the path continues inside it.
    """
    if reference.text in record:
        return record[reference.text]
    value: Any = record
    # Only mappings and lists are entered: a path never reaches an attribute.
    for step in reference.steps:
        if isinstance(value, str):
            value = _parse_json(value)
        if isinstance(value, list) and isinstance(step, int):
            value = value[step] if -len(value) <= step < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(str(step))
        else:
            return None
    return value


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(reference: Reference, record: Mapping[str, Any]) -> str:
    value = lookup(reference, record)
    if value is None:
        if reference.is_optional:
            return ""
        raise MissingValue(
            f"there is no value for '{{{reference.text}}}'; write '{{{reference.text}?}}' if it may be absent"
        )
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(value)
    kind = type(value).__name__
    example = f"{{{reference.text}[0]}}" if isinstance(value, list) else f"{{{reference.text}.key}}"
    raise MissingValue(f"'{{{reference.text}}}' holds {kind}, not text; name a value inside it, like {example}")
