"""``python -m tools.dump_fields``: write the fields of the classes with options for ``align.config.options``.

Imports the installed trl, transformers and peft, and torch with them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from importlib.metadata import version
from typing import Any, Literal

from align.config.options import METHODS, REFUSED
from align.config.options.field_dumps import PEFT, SHIPPED, TRAINERS
from align.config.stages.training import TrainingFields
from align.pipeline.registry import STAGES, load_object
from align.store.json_files import write_text_atomically

PACKAGES = {TRAINERS: ("trl", "transformers"), PEFT: ("peft",)}
"""Packages that define the classes of a dump."""


def trainer_fields() -> dict[str, dict[str, Any]]:
    """Return the fields of every class that accepts options of a stage's ``trainer:``, by its import path."""
    classes = {stage.trainer_class for stage in STAGES.values() if stage.trainer_class is not None}
    return {path: class_fields(load_object(path)) for path in sorted({TrainingFields.trainer_class, *classes})}


def peft_fields() -> dict[str, dict[str, Any]]:
    """Return the fields of the config class of every method of peft that ``type`` may name, by method."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {kind: class_fields(classes[kind]) for kind in sorted(classes.keys() - METHODS - REFUSED.keys())}


def class_fields(cls: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that its constructor accepts, by name.

    Each has its ``type`` as text, the ``choices`` that its metadata or type lists, and a ``default`` that JSON can
    hold. No code reads the default. It shows in a diff if a new version of a package has another default.
    """
    try:
        annotations = typing.get_type_hints(cls)
    except Exception:  # an annotation names what only type checkers import
        annotations = {}
    fields = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.name.startswith("_"):
            continue
        text, choices = _describe_type(annotations.get(field.name, field.type))
        description: dict[str, Any] = {"type": text}
        choices = _as_json(list(field.metadata.get("choices") or ())) or choices
        if choices:
            description["choices"] = choices
        default = _as_json(field.default)
        if default is not None or field.default is None:
            description["default"] = default
        fields[field.name] = description
    return fields


def _as_json(value: Any) -> Any:
    """Return ``value`` as JSON reads it back; None if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _describe_type(annotation: Any) -> tuple[str, list[Any]]:
    """Return a type as text, such as ``dict[str, Any] | None``, and the values that it lists.

    Literals are choices if the type allows only them and None. In a union with other types they count as their own
    type.
    """
    members = _union_members(annotation)
    literals = [value for member in members for value in _literal_values(member)]
    others = [member for member in members if not _literal_values(member)]
    if not literals:
        return type_text(annotation), []
    if set(others) <= {type(None)}:
        return type_text(annotation), [*literals, *([None] if others else [])]
    return _join_members([*map(type_text, others), *(type(value).__name__ for value in literals)]), []


def _join_members(members: list[str]) -> str:
    """Join the members of a union in alphabetical order, None last.

    ``typing`` keeps equal unions once, so their order depends on earlier imports.
    """
    return " | ".join(sorted(set(members), key=lambda member: (member == "None", member)))


def _union_members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _union_members(member)]
    return [annotation]


def _literal_values(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def type_text(annotation: Any) -> str:
    """Return a type as an author would write it, without the modules of its names."""
    if annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, str):  # an unresolved annotation
        return annotation
    values = _literal_values(annotation)
    if values:
        return f"Literal[{', '.join(map(repr, values))}]"
    arguments = typing.get_args(annotation)
    if isinstance(annotation, list):  # the parameters of a Callable
        return f"[{', '.join(map(type_text, annotation))}]"
    members = _union_members(annotation)
    if len(members) > 1:
        return _join_members([type_text(member) for member in members])
    name = getattr(annotation, "__name__", None) or str(annotation)
    return f"{name}[{', '.join(map(type_text, arguments))}]" if arguments else str(name)


def shipped_text() -> str:
    """Return the content of the shipped file for the installed versions, a field a line."""
    sections = []
    for name, dump in ((TRAINERS, trainer_fields()), (PEFT, peft_fields())):
        classes = []
        for path, fields in dump.items():
            lines = [f"{json.dumps(field)}: {json.dumps(description)}" for field, description in fields.items()]
            classes.append(f"{json.dumps(path)}: {{\n" + ",\n".join(lines) + "\n}")
        versions = json.dumps({package: version(package) for package in PACKAGES[name]})
        sections.append(f'"{name}": {{"versions": {versions}, "classes": {{\n' + ",\n".join(classes) + "\n}}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    write_text_atomically(SHIPPED, shipped_text())
