"""Base of every configuration block, and fields that name earlier stages. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from align.config.field_descriptions import field_docstrings
from align.store.artifacts import Kind

Precision = Literal["bfloat16", "float32"]
"""Type of matrix products; weights stay float32 (``align.models.compute.precision``)."""
PrecisionSetting = Literal["auto", "bfloat16", "float32"]
"""``precision`` in a YAML: ``auto`` is the type that the device multiplies faster in, measured when a stage starts."""


class Config(BaseModel):
    """Base of every configuration block: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # "true" is not a number of steps, and "3" is not a number
        allow_inf_nan=False,
        protected_namespaces=(),
        # A validator is built when it validates: one command needs few of the classes that it imports.
        defer_build=True,
    )

    identified: ClassVar[frozenset[str]] = frozenset()
    """Fields whose meaning ``identities`` covers, mostly paths; the stage's key leaves their text out."""
    keyed_when_set: ClassVar[frozenset[str]] = frozenset()
    """Fields that keys omit while they have their default, to keep the keys from before these fields."""
    unkeyed: ClassVar[frozenset[str]] = frozenset()
    """Fields of a nested block that no key counts by their text: an identity of the stage covers what matters."""
    retired: ClassVar[Mapping[str, Any]] = {}
    """Removed fields with their default. Keys still count them, so earlier keys stay the same."""

    def fields_outside_key(self) -> set[str]:
        """Return the fields whose text the stage's key leaves out: ``identified``, unless their value decides."""
        return set(self.identified)

    def changed(self, *names: str) -> list[str]:
        """Return the fields in ``names`` that differ from their defaults.

        Not ``model_fields_set``: a stage's process reads its config back with every default written out.
        """
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default(call_default_factory=True)]

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the block's JSON schema, with the docstrings of its fields as descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, docstring in field_docstrings(cls).items():
            key = cls.model_fields[name].alias or name
            if key in properties:
                properties[key]["description"] = docstring
        return schema

    @classmethod
    def remedy_for_unknown(cls, key: str) -> str | None:
        """Return a sentence on what to do with a key that the block does not have, or None for a mere slip."""
        return None


def settings_for_key(value: Any, dumped: Any) -> Any:
    """Return ``dumped``, the ``model_dump`` of a config or of a list or mapping of them, as keys count it.

    See ``keyed_when_set``, ``unkeyed`` and ``retired``; all count at every level. Fields that ``dumped`` lacks are
    omitted.
    """
    if isinstance(value, Config) and isinstance(dumped, Mapping):
        settings = {}
        for name, dumped_value in dumped.items():
            if name in value.unkeyed:
                continue
            field_value = getattr(value, name)
            if name in value.keyed_when_set and field_value == type(value).model_fields[name].get_default():
                continue
            settings[name] = settings_for_key(field_value, dumped_value)
        return {**settings, **value.retired}
    if isinstance(value, Mapping) and isinstance(dumped, Mapping):
        # By order: JSON turns keys that are numbers into text.
        pairs = zip(value.values(), dumped.items(), strict=True)
        return {name: settings_for_key(item, dumped_item) for item, (name, dumped_item) in pairs}
    if isinstance(value, (list, tuple)) and isinstance(dumped, (list, tuple)):
        return [settings_for_key(item, dumped_item) for item, dumped_item in zip(value, dumped, strict=True)]
    return dumped


@dataclass(frozen=True)
class StageInput:
    """Marks a config field (a stage's name, or a list of names) as an input, with the artifacts that it accepts."""

    kinds: tuple[Kind, ...]


def stage_input(*kinds: Kind) -> Any:
    """Return the type of a config field that names an earlier stage, which makes an artifact of ``kinds``.

    ``policy: stage_input(Kind.POLICY)``; use ``list[stage_input(...)]`` for several, ``| None`` for an optional input.
    """
    return Annotated[str, StageInput(kinds)]


@functools.cache
def input_fields(config_class: type[Config]) -> Mapping[str, StageInput]:
    """Return the config fields that name earlier stages, with the artifacts that each accepts.

    A field of a block is written as ``environment.user.model``. A field of blocks in a list is written as
    ``score.reward``, for ``score: [{reward: STAGE}, ...]``.
    """
    fields: dict[str, StageInput] = {}
    for name, info in config_class.model_fields.items():
        marker = _find_marker(info.annotation, info.metadata)
        if marker is not None:
            fields[name] = marker
        for block in _blocks(info.annotation):
            fields |= {f"{name}.{nested}": marker for nested, marker in input_fields(block).items()}
    return MappingProxyType(fields)


def input_names(config: Config, name: str) -> str | list[str] | None:
    """Return the stages that a field of ``input_fields`` names, for blocks in a list of all blocks in order."""
    field, _, nested = name.partition(".")
    # The block may be of another class of its union, which lacks the field.
    value = getattr(config, field, None)
    blocks = [block for block in value if isinstance(block, Config)] if isinstance(value, list) else []
    if not nested:
        # A field may hold a stage's name or blocks, whose inputs have nested names.
        return None if blocks or isinstance(value, Config) else value  # type: ignore[no-any-return]
    if isinstance(value, Config):
        return input_names(value, nested)
    names: list[str] = []
    for block in blocks:
        nested_names = input_names(block, nested)
        names += [nested_names] if isinstance(nested_names, str) else nested_names or []
    return names or None


def names_in_block(block: Mapping[str, Any], name: str) -> list[str]:
    """Return the stages that a field of ``input_fields`` names in a stage's block, as the YAML has it."""
    values: list[Any] = [block]
    for field in name.split("."):
        inside: list[Any] = []
        for value in values:
            content = value.get(field) if isinstance(value, Mapping) else None
            inside += content if isinstance(content, list) else [content]
        values = inside
    return [value for value in values if isinstance(value, str)]


def rename_in_block(block: Any, name: str, rename: Callable[[str], str]) -> Any:
    """Return a stage's block, as the YAML has it, with the stages that a field of ``input_fields`` names renamed."""
    if isinstance(block, list):
        return [rename_in_block(item, name, rename) for item in block]
    field, _, nested = name.partition(".")
    if not isinstance(block, Mapping) or field not in block:
        return block
    value = block[field]
    if nested:
        value = rename_in_block(value, nested, rename)
    elif isinstance(value, str):
        value = rename(value)
    return {**block, field: value}


def _blocks(annotation: Any) -> list[type[Config]]:
    """Return the config classes that a field holds, by itself or as items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) not in (Annotated, Union, UnionType, list):
        return []
    return [block for argument in annotation.__args__ for block in _blocks(argument)]


def _find_marker(annotation: Any, metadata: list[Any]) -> StageInput | None:
    for item in metadata:
        if isinstance(item, StageInput):
            return item
    # Markers hide inside lists and unions: ``list[stage_input(...)] | None``.
    for argument in getattr(annotation, "__args__", ()):
        marker = _find_marker(argument, list(getattr(argument, "__metadata__", ())))
        if marker is not None:
            return marker
    return None
