"""Base of every configuration block, and fields that name earlier stages. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from align.store.artifacts import Kind

Precision = Literal["bfloat16", "float32"]
"""Type of matrix products; weights stay float32 (``align.models.precision``)."""


class Config(BaseModel):
    """Base of every configuration block: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # "true" is not a number of steps, and "3" is not a number
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that were added later. At its default such a field is no part of a stage's key, so older keys stay."""
    identified: ClassVar[frozenset[str]] = frozenset()
    """Fields whose meaning ``identities`` covers, mostly paths; the stage's key leaves their text out."""


@dataclass(frozen=True)
class StageInput:
    """Marks a config field (a stage's name, or a list of them) as an input, with the artifacts that it takes."""

    kinds: tuple[Kind, ...]


def stage_input(*kinds: Kind) -> Any:
    """Return the type of a config field that names an earlier stage, which makes one of ``kinds``.

    ``policy: stage_input(Kind.POLICY)``; use ``list[stage_input(...)]`` for several, ``| None`` for an optional one.
    """
    return Annotated[str, StageInput(kinds)]


def input_fields(config_class: type[Config]) -> dict[str, StageInput]:
    """Return the config fields that name earlier stages, with the artifacts that each takes."""
    fields: dict[str, StageInput] = {}
    for name, info in config_class.model_fields.items():
        marker = _find_marker(info.annotation, info.metadata)
        if marker is not None:
            fields[name] = marker
    return fields


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
