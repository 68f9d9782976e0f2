"""From a YAML file to a checked config object, with errors that name the place and the remedy.

Leaves out what the fields mean: that stands in the config classes. Never imports torch.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from align.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which YAML readers otherwise drop in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here a second time", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 5e-4 as text: it wants a dot and a sign. Everyone who writes learning rates means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises ``UserError`` for a file that is missing (similar names are suggested), is not UTF-8, does not parse
    (line and column), repeats a key, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.{_similar_files(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file in it.{_similar_files(path / 'x.yaml')}") from None
    except PermissionError:
        raise UserError(f"{path}: not readable; check its permissions.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {type(data).__name__}"
        raise UserError(f"{path}: expected a mapping of keys to values, but the file {what}.")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely; ``UserError`` names line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown place"
        raise UserError(f"{where}: invalid YAML at {place}: {error.problem or error}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: invalid YAML: {error}.") from None


def _similar_files(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f" Did you mean {folder / close[0]}?"
    if names:
        return f" {folder} has: {', '.join(names)}."
    return "" if folder.is_dir() else f" Nor is there a folder {folder}; relative paths start at the current folder."


def suggest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known name, else the known names, else nothing."""
    names = sorted(set(known))
    close = nearest(name, names)
    if close is not None:
        return f" Did you mean '{close}'?"
    return f" Known here: {', '.join(names)}." if names else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely misspells, or None."""
    lowered = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=1, cutoff=0.55)
    return lowered[close[0]] if close else None


def validate(config_class: type[Model], mapping: Any, where: str) -> Model:
    """Check ``mapping`` against ``config_class``; ``UserError`` lists every mistake with its path below ``where``.

    ``where`` reads like ``pipelines/ppo.yaml: stages.ppo``.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a mapping of keys to values, found {mapping!r}.")
    try:
        return config_class.model_validate(dict(mapping))
    except ValidationError as error:
        # An unknown key explains the missing one beside it, so it comes first.
        details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError("\n".join(_explain(config_class, detail, where) for detail in details)) from None


def _explain(config_class: type[BaseModel], detail: ErrorDetails, where: str) -> str:
    shown, models = _walk(config_class, detail["loc"])
    prefix, _, path = where.partition(": ") if ": " in where else (where, "", "")
    full = ".".join([path, *shown] if path else shown)
    place = f"{prefix}: {full}" if full else prefix
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        parent = place.rsplit(".", 1)[0] if "." in full else prefix
        known = [name for model in models for name in model.model_fields]
        return f"{parent}: unknown key '{detail['loc'][-1]}'.{suggest(str(detail['loc'][-1]), known)}"
    if kind == "missing":
        return f"{place}: this key is required and missing."
    if kind == "union_tag_not_found":
        key = str(context.get("discriminator", "")).strip("'")
        given = detail["input"] if isinstance(detail["input"], Mapping) else {}
        slip = nearest(key, [str(name) for name in given])
        if slip:
            return f"{place}: unknown key '{slip}'. Did you mean '{key}'?"
        return f"{place}: the key '{key}' is required and missing."
    if kind == "union_tag_invalid":
        key = str(context.get("discriminator", "")).strip("'")
        expected = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        return f"{place}.{key}: unknown value '{context.get('tag')}'.{suggest(str(context.get('tag')), expected)}"
    if kind == "literal_error":
        choices = str(context.get("expected", ""))
        names = [part.strip(" '") for part in choices.replace(" or ", ",").split(",")]
        return f"{place}: {detail['input']!r} is none of {choices}.{suggest(str(detail['input']), names)}"
    if kind in ("value_error", "assertion_error"):
        return f"{place}: {detail['msg'].removeprefix('Value error, ').removeprefix('Assertion failed, ')}"
    message = detail["msg"].replace("Input should be", "should be", 1)
    return f"{place}: {message}; found {detail['input']!r}."


def _walk(config_class: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Path as the YAML spells it (without union tags), and the models that hold the last key of ``loc``."""
    current: list[Any] = [config_class]
    shown: list[str] = []
    holders: list[type[BaseModel]] = [config_class]
    for part in loc:
        holders = [kind for kind in current if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if isinstance(part, int):
            shown[-1:] = [f"{shown[-1] if shown else ''}[{part}]"]
            current = [arg for kind in current for arg in _members(typing.get_args(kind)[:1])]
            continue
        tagged = [model for model in holders if part in _tags(model)]
        if tagged and not any(part in model.model_fields for model in holders):
            current = list(tagged)
            holders = tagged
            continue
        fields = [model.model_fields[part] for model in holders if part in model.model_fields]
        values = [arg for kind in current if typing.get_origin(kind) is dict for arg in typing.get_args(kind)[1:]]
        if not fields and values:
            shown.append(part)
            current = _members(values)
            continue
        if not fields and part != loc[-1]:
            continue  # a branch label of a plain union, which the YAML does not spell
        if not fields and not holders:
            continue
        shown.append(part)
        current = [member for field in fields for member in _members([field.annotation])]
    return shown, holders


def _members(annotations: Iterable[Any]) -> list[Any]:
    """Flatten ``Annotated`` and unions into their member types."""
    found: list[Any] = []
    for annotation in annotations:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            found += _members(typing.get_args(annotation)[:1])
        elif origin in (typing.Union, types.UnionType):
            found += _members(typing.get_args(annotation))
        else:
            found.append(annotation)
    return found


def _tags(model: type[BaseModel]) -> set[str]:
    """Values of the model's single-value literal fields, which discriminate unions."""
    return {
        str(value)
        for field in model.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for value in typing.get_args(field.annotation)
    }
