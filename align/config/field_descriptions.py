"""Docstrings and descriptions of the fields of configuration blocks, for documents and terminals. Torch-free.

A field has its name, its type in YAML's words, its default, its bounds and its docstring. Values and names are in
backticks, as in Markdown. A docstring is read from the source when it is needed: pydantic would parse the source of
every class at its import, which took a third of the time of ``align plan``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

BlockNaming = Callable[[Sequence[type[BaseModel]]], str]
"""Returns words for a value that is a block of these classes: links in a document, a list in a terminal."""

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
LONGEST_DEFAULT = 60
"""Characters of a default that a description shows in full."""


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields by the field's name.

    An inherited field has the docstring of the class that defines it. A ``description`` in a field's ``Field(...)``
    takes precedence. The result is empty for a class without source.
    """
    docstrings = {}
    for name, field in model.model_fields.items():
        text = field.description or _docstring_of(model, name)
        if text:
            docstrings[name] = text
    return docstrings


def _docstring_of(model: type[BaseModel], name: str) -> str | None:
    """Return the docstring that follows the field in the class that declares it last."""
    for declaring in model.__mro__:
        if name in vars(declaring).get("__annotations__", {}):
            return _module_docstrings(declaring.__module__).get(declaring.__qualname__, {}).get(name)
    return None


@functools.cache
def _module_docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of a module's classes: the class's qualified name → field → text."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    return dict(_class_docstrings(ast.parse(source), ""))


def _class_docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", dict(_attribute_docstrings(child))
            yield from _class_docstrings(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _class_docstrings(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _class_docstrings(child, prefix)


def _attribute_docstrings(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield each annotated attribute that a text follows, with the text."""
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
            continue
        if isinstance(following.value.value, str):
            yield statement.target.id, inspect.cleandoc(following.value.value)


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


def describe_type(annotation: Any, name_blocks: BlockNaming) -> str:
    """Return an annotation in YAML's words: ``list of string``, ``integer or null``, the name of a nested block."""
    if annotation in SCALARS:
        return SCALARS[annotation]
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments, name_blocks)
    if origin is Literal:
        return " or ".join(_code(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return _describe_union(arguments, name_blocks)
    if origin in (list, tuple, set, frozenset):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return f"list of {describe_type(items[0], name_blocks)}" if items else "list"
    if origin is dict:
        key, value = (describe_type(argument, name_blocks) for argument in arguments)
        return f"mapping of {key} to {value}"
    if _is_block(annotation):
        return name_blocks([annotation])
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(_code(member.value) for member in annotation)
    return SCALARS.get(origin, getattr(annotation, "__name__", str(annotation)))


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _describe_union(arguments: tuple[Any, ...], name_blocks: BlockNaming) -> str:
    blocks = [argument for argument in arguments if _is_block(argument)]
    words = []
    for argument in arguments:
        # The first block's position names all blocks together.
        words.append(name_blocks(blocks) if argument in blocks else describe_type(argument, name_blocks))
    return " or ".join(dict.fromkeys(words))


def _describe_annotated(arguments: tuple[Any, ...], name_blocks: BlockNaming) -> str:
    # an input field is a string that names a stage; its marker says what that stage has to make
    for marker in arguments[1:]:
        if hasattr(marker, "kinds"):
            return "name of a stage that makes " + " or ".join(kind.value for kind in marker.kinds)
    return describe_type(arguments[0], name_blocks)


def describe_bounds(field: FieldInfo) -> str:
    """Return a field's bounds, ``> 0, ≤ 1``; empty if it has none."""
    members = [member for member in get_args(field.annotation) if get_origin(member) is Annotated]
    infos = [info for member in members for info in get_args(member)[1:] if isinstance(info, FieldInfo)]
    words = []
    for constraint in (constraint for info in (field, *infos) for constraint in info.metadata):
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
        return "required"
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


@dataclass(frozen=True)
class FieldDescription:
    """A field in words: all of them Markdown on one line, ``meaning`` with a line for each paragraph."""

    name: str
    is_required: bool
    type: str
    default: str
    """The default as YAML has it, or ``required``."""
    bounds: str
    meaning: str


def describe_fields(model: type[BaseModel], name_blocks: BlockNaming) -> list[FieldDescription]:
    """Return the description of each field of a block, required fields first."""
    fields = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    docstrings = field_docstrings(model)
    return [
        FieldDescription(
            field.alias or name,
            field.is_required(),
            describe_type(marked_annotation(field), name_blocks),
            describe_default(field),
            describe_bounds(field),
            join_lines(docstrings.get(name, "")),
        )
        for name, field in fields
    ]


def marked_annotation(field: FieldInfo) -> Any:
    """Return a field's annotation with the marker of a stage's name, which pydantic moves to the metadata."""
    for marker in field.metadata:
        if hasattr(marker, "kinds"):
            return Annotated[field.annotation, marker]
    return field.annotation


def join_lines(docstring: str) -> str:
    """Return a docstring with each of its paragraphs on one line."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    return "\n".join(re.sub(r"\s+", " ", text.strip()) for text in paragraphs)


def discriminator(model: type[BaseModel]) -> str | None:
    """Return ``method: lora`` for a block that one value of a field selects among several; None for another block."""
    for name, field in model.model_fields.items():
        values = get_args(field.annotation)
        if get_origin(field.annotation) is Literal and len(values) == 1:
            return f"{name}: {values[0]}"
    return None
