"""Markdown tables of configuration blocks, read from their pydantic classes.

A table has a row for each field: name, type as YAML has it, default, bounds, and the docstring. Torch-free.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Link = Callable[[type[BaseModel]], str]
"""Returns the address of a block's section, seen from the page that is being written."""

SCALARS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    Path: "path",
    type(None): "null",
    Any: "any value",
}
BOUNDS = {
    "gt": "> {}",
    "ge": "≥ {}",
    "lt": "< {}",
    "le": "≤ {}",
    "multiple_of": "a multiple of {}",
    "min_length": "length ≥ {}",
    "max_length": "length ≤ {}",
    "pattern": "matches `{}`",
}
MOST_LINKS = 3
"""Alternatives that a type lists one by one when they are on another page."""
LONGEST_DEFAULT = 60
"""Characters of a default that a table shows in full."""


def nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the configuration classes inside an annotation, in the order written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from nested_models(argument)


def reachable_models(root: type[BaseModel], barriers: Iterable[type[BaseModel]] = ()) -> Iterator[type[BaseModel]]:
    """Yield ``root`` and every block below it once, parents first; ``barriers`` and what only they reach stay out."""
    visited = set(barriers)
    waiting = [root]
    while waiting:
        model = waiting.pop(0)
        if model in visited:
            continue
        visited.add(model)
        yield model
        for field in model.model_fields.values():
            waiting.extend(nested_models(field.annotation))


def describe_type(annotation: Any, link: Link) -> str:
    """Return an annotation in YAML's words: ``list of string``, ``integer or null``, a link to a nested block."""
    if annotation in SCALARS:
        return SCALARS[annotation]
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments, link)
    if origin is Literal:
        return " or ".join(_code(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return _describe_union(arguments, link)
    if origin in (list, tuple, set, frozenset):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return f"list of {describe_type(items[0], link)}" if items else "list"
    if origin is dict:
        return f"mapping of {describe_type(arguments[0], link)} to {describe_type(arguments[1], link)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}]({link(annotation)})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(_code(member.value) for member in annotation)
    return SCALARS.get(origin, getattr(annotation, "__name__", str(annotation)))


def _describe_union(arguments: tuple[Any, ...], link: Link) -> str:
    models = [argument for argument in arguments if argument in set(nested_models(argument))]
    pages = {link(model).partition("#")[0] for model in models}
    if len(models) > MOST_LINKS and pages != {""} and len(pages) == 1:
        return f"a block of [this page]({pages.pop()})"
    words = [describe_type(argument, link) for argument in arguments]
    return " or ".join(dict.fromkeys(words))


def _describe_annotated(arguments: tuple[Any, ...], link: Link) -> str:
    # an input field is a string that names a stage; its marker says what that stage has to make
    for marker in arguments[1:]:
        if hasattr(marker, "kinds"):
            return "name of a stage that makes " + " or ".join(kind.value for kind in marker.kinds)
    return describe_type(arguments[0], link)


def describe_bounds(field: FieldInfo) -> str:
    """Return a field's bounds, ``> 0, ≤ 1``; empty where it has none."""
    words = []
    for constraint in field.metadata:
        for name, form in BOUNDS.items():
            value = getattr(constraint, name, None)
            if value is not None and not isinstance(constraint, annotated_types.Len):
                words.append(form.format(value))
        if isinstance(constraint, annotated_types.Len):
            words.extend(_describe_length(constraint))
    return ", ".join(words)


def _describe_length(constraint: annotated_types.Len) -> Iterator[str]:
    if constraint.min_length:
        yield BOUNDS["min_length"].format(constraint.min_length)
    if constraint.max_length is not None:
        yield BOUNDS["max_length"].format(constraint.max_length)


def describe_default(field: FieldInfo) -> str:
    """Return a field's default as YAML would have it, or ``required``."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return _code(changed) if changed else "its defaults"
    text = _code(value)
    return text if len(text) <= LONGEST_DEFAULT else f"{text[:LONGEST_DEFAULT]}…`"


def _code(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    if isinstance(value, Enum):
        return f"`{value.value}`"
    return f"`{json.dumps(value, default=str)}`"


def field_table(model: type[BaseModel], link: Link) -> str:
    """Return the table of a block's fields, required ones first."""
    rows = ["| field | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in fields:
        cells = (
            f"`{name}`",
            describe_type(_with_marker(field), link),
            describe_default(field),
            describe_bounds(field),
            paragraph(field.description or ""),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _with_marker(field: FieldInfo) -> Any:
    # pydantic moves the outermost ``Annotated`` of a field into its metadata
    for marker in field.metadata:
        if hasattr(marker, "kinds"):
            return Annotated[field.annotation, marker]
    return field.annotation


def paragraph(docstring: str) -> str:
    """Return a docstring on one line, its paragraphs separated by line breaks."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    return "<br>".join(re.sub(r"\s+", " ", text) for text in paragraphs)


def discriminator(model: type[BaseModel]) -> str | None:
    """Return ``method: lora`` for a block that one value of a field selects among several; None for another block."""
    for name, field in model.model_fields.items():
        values = get_args(field.annotation)
        if get_origin(field.annotation) is Literal and len(values) == 1:
            return f"{name}: {values[0]}"
    return None


def block_section(model: type[BaseModel], title: str, link: Link) -> str:
    """Return a block's section: heading, docstring and table."""
    docstring = model.__doc__ or ""
    introduction = "\n".join(line.strip() for line in docstring.strip().splitlines())
    heading = f"## {title} {{#{anchor(model)}}}"
    return "\n\n".join(part for part in (heading, introduction, field_table(model, link)) if part) + "\n"


def anchor(model: type[BaseModel]) -> str:
    """Return the id of a block's section on its page."""
    return model.__name__.lower()
