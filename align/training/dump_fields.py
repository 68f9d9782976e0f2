"""``python -m align.training.dump_fields``: the fields of the classes with options, for ``config.field_dumps``.

Without arguments it writes the shipped dumps for the installed trl, transformers and peft. ``align plan`` starts it
with a dump's name, or a class's import path, and a file for the result. Imports those packages, and torch with them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from align.config.options import METHODS, REFUSED
from align.config.options.field_dumps import PACKAGES, PEFT, SHIPPED, TRAINERS, FieldDump
from align.config.stages.training import TrainingFields
from align.config.user_functions import search_module_folders
from align.pipeline.registry import STAGES
from align.store.json_files import write_text_atomically


def dump_trainers() -> FieldDump:
    """Return the fields of every class that accepts options of a stage's ``trainer:``."""
    classes = {stage.trainer_class for stage in STAGES.values() if stage.trainer_class is not None}
    # A stage of the user's that names no class has the base class's.
    return dump_classes(*sorted({TrainingFields.trainer_class, *classes}))


def dump_peft() -> FieldDump:
    """Return the fields of the config class of every method of peft that ``type`` may name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return FieldDump({kind: class_fields(classes[kind]) for kind in sorted(classes.keys() - METHODS - REFUSED.keys())})


def dump_classes(*paths: str) -> FieldDump:
    """Return the fields of the classes with these import paths, or for each the reason why there are none."""
    dump = FieldDump()
    for path in paths:
        try:
            dump.classes[path] = _read_class(path)
        except Exception as error:  # whatever the module's code raises
            module = path.partition(":")[0]
            reason = f"{type(error).__name__}: {error}"
            dump.errors[path] = (
                f"importing {module} failed ({reason}). `{sys.executable} -c 'import {module}'` shows the whole error."
            )
    return dump


def _read_class(path: str) -> dict[str, Any] | str:
    """Return a class's fields, or the reason why it has none. Raises what importing its module raises."""
    module_name, _, name = path.partition(":")
    package, *submodules = module_name.split(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The dots keep ``my`` from matching ``mypackage``.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        return f"{package} has no file {'/'.join(submodules)}.py." if submodules else f"there is no module {package}."
    loaded = getattr(module, name, None)
    if loaded is None:
        return f"{module.__file__} has no class {name}; this version of {package} is not one align knows."
    if not isinstance(loaded, type) or not dataclasses.is_dataclass(loaded):
        return f"{name} in {module.__file__} is no dataclass."
    return class_fields(loaded)


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
    """Return the content of the shipped file for the installed versions, a field a line.

    Raises ``RuntimeError`` if a class cannot be read, because the tested versions have all of them.
    """
    sections = []
    for name, dump in ((TRAINERS, dump_trainers()), (PEFT, dump_peft())):
        if dump.errors:
            raise RuntimeError("\n".join(dump.errors.values()))
        classes = []
        for path, fields in dump.classes.items():
            if isinstance(fields, str):
                raise RuntimeError(f"{path}: {fields}")
            lines = [f"{json.dumps(field)}: {json.dumps(description)}" for field, description in fields.items()]
            classes.append(f"{json.dumps(path)}: {{\n" + ",\n".join(lines) + "\n}")
        versions = json.dumps({package: version(package) for package in PACKAGES[name]})
        sections.append(f'"{name}": {{"versions": {versions}, "classes": {{\n' + ",\n".join(classes) + "\n}}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main(arguments: list[str]) -> None:
    """Write the shipped file, or with a subject and a file (``-`` for standard output) that dump."""
    if not arguments:
        write_text_atomically(SHIPPED, shipped_text())
        return
    subject, target = arguments
    search_module_folders()
    special = {TRAINERS: dump_trainers, PEFT: dump_peft}
    dump = special[subject]() if subject in special else dump_classes(subject)
    text = json.dumps(dataclasses.asdict(dump))
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        write_text_atomically(Path(target), text)


if __name__ == "__main__":
    main(sys.argv[1:])
