"""Validate a mapping against a config class, with errors that name the place and the remedy. Never imports torch.

``yaml.py`` reads files; the config classes define the fields.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from align.config.base import Config
from align.config.field_descriptions import discriminator, marked_annotation
from align.config.synonyms import TAGS, UNNEEDED, VALUES, find_synonym
from align.errors import MOST_SHOWN, UserError, shorten, with_article

Model = TypeVar("Model", bound=BaseModel)
_SURROGATE = re.compile("[\ud800-\udfff]")


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest candidate, else all candidates, else an empty text."""
    names = sorted(set(candidates))
    listing = f" Known here: {', '.join(names)}." if names else ""
    return hint_nearest(name[:MOST_SHOWN], names) or listing


def hint_nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest candidate, or an empty text."""
    close = nearest(name, candidates)
    return f" Did you mean '{close}'?" if close else ""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that ``name`` most likely misspells, or None."""
    lowered = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=1, cutoff=0.55)
    return lowered[close[0]] if close else None


def validate(config_class: type[Model], mapping: Any, where: str, stage: type[BaseModel] | None = None) -> Model:
    """Return ``mapping`` as a ``config_class``; raise ``UserError`` with every mistake and its path below ``where``.

    ``where`` reads like ``pipelines/hh.yaml: stages.ppo``. ``stage`` is the config class that keys of another
    tool at the top of a pipeline belong to, if it is known.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected a mapping of keys to values, found {_shown(mapping)}.")
    problems = list(_problems(mapping, ()))
    if problems:
        raise UserError("\n".join(f"{_place(where, path)}: {problem}" for path, problem in problems))
    try:
        return validate_plain(config_class, mapping)
    except ValidationError as error:
        # an unknown key explains a missing key, so it comes first
        # A default that follows from a mistaken field is no mistake.
        errors = [
            detail for detail in error.errors(include_url=False) if detail["type"] != "default_factory_not_called"
        ]
        details = sorted(errors, key=lambda detail: detail["type"] != "extra_forbidden")
        # pydantic reports a mistake once for every member of a union; only the most specific report helps.
        mistakes = [(detail, _locate(config_class, detail)) for detail in details]
        lines = [_explain(detail, place, where, stage) for detail, place in _most_specific(mistakes)]
        raise UserError("\n".join(lines)) from None


def validate_plain(config_class: type[Model], mapping: Mapping[str, Any]) -> Model:
    """Validate plain values of YAML, JSON or Python as pydantic validates JSON.

    Strict fields then accept a list for a tuple, text for a path and text for a mapping's numeric key, but no text for
    a number. Raises pydantic's ``ValidationError``.
    """
    return config_class.model_validate_json(json.dumps(dict(mapping), default=_encode))


def _encode(value: Any) -> Any:
    """Convert values that JSON lacks: a config object from Python code, or a number of numpy."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value.item()


def plain_value(value: Any) -> Any:
    """Return numbers and arrays of numpy and torch as Python's numbers and lists, also inside of lists and mappings."""
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


MAX_INTEGER = 2**63
"""Limit of integers in the file formats of rows and records."""


def _problems(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and problem of values that no field may have; fields of type ``Any`` would accept them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int | float) or isinstance(key, bool):
                yield path, f"the key {_shown(key)} is neither text nor a number; put it in quotes."
            elif (problem := _problem(key)) is not None:
                yield path, f"the key {_shown(key)} {problem}"
            else:
                yield from _problems(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _problems(item, (*path[:-1], f"{path[-1] if path else ''}[{index}]"))
    elif (problem := _problem(value)) is not None:
        yield path, problem


def _problem(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "has a NUL character, which no path and no file of text may have."
        return "has half a character (a lone surrogate), which is not text." if _SURROGATE.search(value) else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"should be a finite number; found {value}."
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        return f"should be from -2**63 to 2**63-1; found {_shown(value)}."
    if value is None or isinstance(value, bool | int | float | BaseModel):
        return None
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # numpy's numbers are checked like Python's
        return _problem(value.item())
    return f"found {_shown(value)}, {with_article(type(value).__name__)}; write text in quotes, or a number."


def _shown(value: Any) -> str:
    """Return a value as messages quote it, cut if it is long."""
    try:
        return shorten(repr(value))
    except ValueError:  # an integer with more digits than Python prints
        return f"an integer of {value.bit_length()} bits"


def _place(where: str, path: tuple[str, ...]) -> str:
    prefix, _, above = where.partition(": ") if ": " in where else (where, "", "")
    full = ".".join((above, *path) if above else path)
    return f"{prefix}: {full}" if full else prefix


@dataclass(frozen=True)
class _Place:
    """Place of a mistake: its path in the YAML, without pydantic's labels of unions, and the expected types."""

    path: tuple[str, ...]
    """Path below the validated block; an index follows its list, ``several[1]``."""
    holders: list[type[BaseModel]]
    """Models that may have the last key."""
    expected: list[Any]
    """Member types of the annotation at the path."""


def _most_specific(mistakes: list[tuple[ErrorDetails, _Place]]) -> list[tuple[ErrorDetails, _Place]]:
    """Return one mistake per place.

    pydantic reports every branch of a union. The user meant the branch that got furthest.
    """
    chosen: dict[tuple[str, ...], tuple[ErrorDetails, _Place]] = {}
    for detail, place in mistakes:
        has_deeper = any(_is_below(deeper.path, place.path) for _, deeper in mistakes)
        if has_deeper and _is_about_type(detail):
            # The user did not mean a member that fails on type, if another member got further in.
            continue
        if place.path not in chosen or _is_about_type(chosen[place.path][0]):
            chosen[place.path] = detail, place
    return list(chosen.values())


def _is_below(path: tuple[str, ...], above: tuple[str, ...]) -> bool:
    if not above:
        return False
    *before, last = above
    same = path[: len(before)] == tuple(before) and len(path) >= len(above)
    return same and path != above and (path[len(before)] == last or path[len(before)].startswith(f"{last}["))


def _is_about_type(detail: ErrorDetails) -> bool:
    """Return whether the value has a wrong type, rather than a wrong value of the right type."""
    kind = detail["type"]
    return kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "int_from_float")


def _explain(detail: ErrorDetails, location: _Place, where: str, stage: type[BaseModel] | None) -> str:
    """Return the message of one mistake."""
    shown = location.path
    models = location.holders
    prefix, _, path = where.partition(": ") if ": " in where else (where, "", "")
    full = ".".join((path, *shown) if path else shown)
    place = _place(where, shown)
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        parent = place.rsplit(".", 1)[0] if "." in full else prefix
        key = str(detail["loc"][-1])
        return f"{parent}: unknown key '{shorten(key)}'. {remedy_for_unknown(key, models, stage)}".rstrip()
    if kind == "missing":
        return f"{place}: this key is required and missing."
    if kind == "union_tag_not_found":
        key = str(context.get("discriminator", "")).strip("'")
        block = detail["input"] if isinstance(detail["input"], Mapping) else {}
        slip = nearest(key, [str(name) for name in block])
        if slip:
            return f"{place}: unknown key '{slip}'. Did you mean '{key}'?"
        return f"{place}: the key '{key}' is required and missing."
    if kind == "union_tag_invalid":
        key = str(context.get("discriminator", "")).strip("'")
        expected = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        tag = str(context.get("tag"))
        hint = f" {TAGS[tag.lower()]}" if key == "method" and tag.lower() in TAGS else suggest(tag, expected)
        return f"{place}.{key}: unknown value '{shorten(tag)}'.{hint}"
    special = kind in ("model_type", "dict_type") or _names_a_stage(location.expected)
    if _is_about_type(detail) and (len(location.expected) > 1 or special):
        listed = [word.strip("'") for kind in location.expected for word in _words(kind) if word.startswith("'")]
        hint = hint_nearest(detail["input"], listed) if isinstance(detail["input"], str) else ""
        hint = _hint_block(detail["input"], location) or hint
        return f"{place}: should be {_in_words(location.expected)}; found {_shown(detail['input'])}.{hint}"
    if kind == "literal_error":
        choices = str(context.get("expected", ""))
        names = [part.strip(" '") for part in choices.replace(" or ", ",").split(",")]
        word = str(detail["input"])
        value = VALUES.get(word.lower())
        hint = f" Did you mean '{value}'?" if value in names else suggest(word, names)
        return f"{place}: {_shown(detail['input'])} is none of {choices}.{hint}"
    if kind in ("value_error", "assertion_error"):
        return f"{place}: {detail['msg'].removeprefix('Value error, ').removeprefix('Assertion failed, ')}"
    if kind in ("bool_type", "bool_parsing") and str(detail["input"]).lower() in YAML_1_1:
        value = YAML_1_1[str(detail["input"]).lower()]
        return f"{place}: should be true or false; found {_shown(detail['input'])}, which is text. Write `{value}`."
    message = detail["msg"].replace("Input should be", "should be", 1)
    return f"{place}: {message}; found {_shown(detail['input'])}."


YAML_1_1 = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
"""Words that YAML 1.1 reads as booleans, and align as text."""


def _hint_block(value: Any, location: _Place) -> str:
    """Return how to write a block of which only the selecting value was given: ``tuning: lora``."""
    if not isinstance(value, str) or not location.path:
        return ""
    blocks = [kind for kind in location.expected if _is_block(kind)]
    selections = [selection for block in blocks if (selection := discriminator(block))]
    by_value = {selection.partition(": ")[2]: selection for selection in selections}
    key = selections[0].partition(":")[0] if selections else ""
    if key == "method" and value.lower() in TAGS:
        return f" {TAGS[value.lower()]}"
    selected = by_value.get(value) or by_value.get(nearest(value, by_value) or "")
    return f" Write `{location.path[-1]}: {{{selected}}}`." if selected else ""


def _is_block(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def remedy_for_unknown(key: str, models: Sequence[type[BaseModel]], stage: type[BaseModel] | None = None) -> str:
    """Return the remedy for a key that no block of ``models`` has.

    The remedy for another tool's name is the field, for an option of the trainer its block, and for a misspelling the
    nearest name.
    """
    synonym = find_synonym(key, models, stage)
    if synonym is not None:
        return synonym
    for model in [*models, stage] if stage else models:
        remedy = model.remedy_for_unknown(key) if issubclass(model, Config) else None
        if remedy is not None:
            return remedy
    if key in UNNEEDED:
        return f"Leave it out: {UNNEEDED[key]}."
    return suggest(key, [name for model in models for name in _fields_by_key(model)]).strip()


def _locate(config_class: type[BaseModel], detail: ErrorDetails) -> _Place:
    """Follow pydantic's location of a mistake through the config classes."""
    current: list[Any] = [config_class]
    shown: list[str] = []
    holders: list[type[BaseModel]] = [config_class]
    *_, last = detail["loc"] or (None,)
    for part in detail["loc"]:
        holders = [kind for kind in current if _is_block(kind)]
        lists = [kind for kind in current if typing.get_origin(kind) is list]
        if isinstance(part, int) and not lists:  # a numeric key of a mapping
            part = str(part)
        if isinstance(part, int):
            # An index belongs to its list: ``several[1]``, not ``several.1``.
            shown[-1:] = [f"{shown[-1] if shown else ''}[{part}]"]
            current = [arg for kind in lists for arg in _members(typing.get_args(kind))]
            continue
        # pydantic puts the discriminator's value into the path, but the YAML has no such key.
        tagged = [model for model in holders if part in _tags(model)]
        if tagged and (len(holders) > 1 or not any(part in _fields_by_key(model) for model in holders)):
            current = list(tagged)
            holders = tagged
            continue
        fields = [_fields_by_key(model)[part] for model in holders if part in _fields_by_key(model)]
        values = [arg for kind in current if typing.get_origin(kind) is dict for arg in typing.get_args(kind)[1:]]
        if not fields and values:
            shown.append(part)
            current = _members(values)
            continue
        if not fields and (part != last or detail["type"] != "extra_forbidden"):
            continue  # a branch label of a plain union, which the YAML does not spell
        shown.append(part)
        current = [member for field in fields for member in _members([marked_annotation(field)])]
    return _Place(tuple(shown), holders, current)


def _fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a block's fields by their YAML key: an alias, if the name is a word of Python's."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _members(annotations: Iterable[Any]) -> list[Any]:
    """Flatten ``Annotated`` and unions into their member types; types that name a stage keep their marker."""
    members: list[Any] = []
    for annotation in annotations:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated and not _names_a_stage([annotation]):
            members += _members(typing.get_args(annotation)[:1])
        elif origin in (typing.Union, types.UnionType):
            members += _members(typing.get_args(annotation))
        else:
            members.append(annotation)
    return members


def _names_a_stage(annotations: Iterable[Any]) -> bool:
    """Return whether an annotation is marked with the ``kinds`` of artifact that a stage must make."""
    return any(hasattr(item, "kinds") for a in annotations for item in getattr(a, "__metadata__", ()))


WORDS: dict[Any, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def _in_words(expected: list[Any]) -> str:
    """Return the types in words, such as ``a text, a list of these, or null``."""
    parts: list[str] = []
    for kind in sorted(expected, key=lambda kind: kind is type(None)):
        if typing.get_origin(kind) is list and parts and _in_words(_members(typing.get_args(kind))) == parts[-1]:
            parts.append("a list of these")
        else:
            parts += [word for word in _words(kind) if word not in parts]
    if len(parts) == 2 and " or " not in parts[0]:
        return " or ".join(parts)
    return ", or ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _words(kind: Any) -> list[str]:
    if _names_a_stage([kind]):
        return [f"the name of a stage that makes {' or '.join(kind.__metadata__[0].kinds)}"]
    if typing.get_origin(kind) is typing.Literal:
        return [repr(value) for value in typing.get_args(kind)]
    if typing.get_origin(kind) is list:
        return [f"a list, each item {_in_words(_members(typing.get_args(kind)))}"]
    return [WORDS.get(kind, "a mapping of keys to values")]


def _tags(model: type[BaseModel]) -> set[str]:
    """Return the values of the model's literal fields, which discriminate unions."""
    return {
        str(value)
        for field in model.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for value in typing.get_args(field.annotation)
    }
