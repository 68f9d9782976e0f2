"""Names that trl, peft, transformers, axolotl, LLaMA-Factory, OpenRLHF and verl give to fields of align. Torch-free.

An unknown key that is such a name is answered with the field: "In align this is 'learning_rate'."
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from align.config.field_descriptions import nested_models

ELSEWHERE = {
    "model": "'{}' of a stage of kind model",
    "data": "'{}' of a stage of kind data",
    "recipe": "'{}' of a data recipe",
    "pipeline": "'{}' at the top of the file",
    "runtime": "'runtime.{}' at the top of the file",
}
"""Blocks that a target may name before a colon: ``runtime:engine.gpu_memory``."""
OWN_FIELDS = {"pipeline": {"stages", "runtime"}, "data": {"recipe", "dataset"}}
"""Fields by which a block of ``ELSEWHERE`` is told from others that have a field of the same name."""


@dataclass(frozen=True)
class Synonym:
    """A field of align, and the names that others give to it."""

    target: str
    """Path of the field below a stage's block, ``tuning.rank``, or below a block of ``ELSEWHERE``."""
    names: list[str]
    note: str = ""
    """Sentence on a value that is written in another way, or counts something else."""


_GROUPS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def _load_synonyms() -> list[Synonym]:
    return [Synonym(**fields) for synonyms in _GROUPS["fields"].values() for fields in synonyms]


SYNONYMS = _load_synonyms()
"""Every field once. If several fields have a name, the answer is the first field that the block can have."""


UNNEEDED: dict[str, str] = {name: reason for reason, names in _GROUPS["unneeded"].items() for name in names}
"""Settings of other tools that have no field → the reason."""

VALUES = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32"}
"""Other words for a value → the value."""


TAGS = {
    "dora": "DoRA is `{method: lora, dora: true}`.",
    "rslora": "rsLoRA is `{method: lora, rslora: true}`.",
    "pissa": "PiSSA is `{method: lora, init: pissa}`.",
    "freeze": "Frozen layers are `{method: full, freeze: […]}`.",
    "lisa": "LISA is `{method: full, lisa: {layers: …}}`.",
}
"""Other words for a ``method`` of tuning → how it is written."""
KINDS = {"pt": "pretrain", "rm": "reward"}
"""LLaMA-Factory's words for a kind of stage → the kind."""
COMMANDS = {"train": "run", "fit": "run", "launch": "run", "evaluate": "eval", "test": "eval", "validate": "plan"}
"""Other words for a command → the command."""


def find_synonym(name: str, models: Sequence[type[BaseModel]], stage: type[BaseModel] | None = None) -> str | None:
    """Return "In align this is 'learning_rate'." for a key that no block of ``models`` has, or None.

    ``stage`` is the config class of the stage that a file without ``stages`` describes at its top, if that is known.
    """
    matches = [synonym for synonym in SYNONYMS if name in synonym.names]
    if _include("pipeline", models):
        # A recipe is a file of its own. At the top of a pipeline the field of a data stage is meant.
        matches = [synonym for synonym in matches if not synonym.target.startswith("recipe:")]
        matches = [synonym for synonym in SYNONYMS if synonym.target == f"data:{name}"] + matches
    for synonym in matches:
        path = _path_in(synonym.target, models)
        if path is not None:
            # The note says how to write a path that begins at the stage; inside the block the name is enough.
            is_complete = path == synonym.target
            return _sentence(f"'{path}'", synonym.note if is_complete else "")
    for synonym in matches:
        block, _, path = synonym.target.rpartition(":")
        if block:
            return _sentence(ELSEWHERE[block].format(path), synonym.note)
    return _find_field_of_stages(name, matches, stage) if _include("pipeline", models) else None


def _find_field_of_stages(name: str, matches: Sequence[Synonym], stage: type[BaseModel] | None) -> str | None:
    """Return the answer to a key at the top of a pipeline that belongs to a stage, or None."""
    if stage is not None:
        matches = [synonym for synonym in matches if _path_in(synonym.target, [stage])]
        if name in stage.model_fields:
            return f"'{name}' belongs to a stage, below 'stages'."
    is_field = stage is None and any(synonym.target == name for synonym in SYNONYMS)
    if not matches:
        return f"'{name}' belongs to a stage, below 'stages'." if is_field else None
    targets = [synonym.target for synonym in matches] + [name] * is_field
    note = matches[0].note if len(targets) == 1 else "The kind of the stage decides."
    return _sentence(f"""{" or ".join(f"'{target}'" for target in targets)} of a stage, below 'stages'""", note)


def _sentence(field: str, note: str) -> str:
    return f"In align this is {field}. {note}".strip()


def _include(block: str, models: Sequence[type[BaseModel]]) -> bool:
    return any(OWN_FIELDS[block] <= model.model_fields.keys() for model in models)


def _path_in(target: str, models: Sequence[type[BaseModel]]) -> str | None:
    """Return the path that leads from a block of ``models`` to the field ``target``; None without a path.

    From the block ``tuning`` itself, ``tuning.rank`` is ``rank``.
    """
    block, _, path = target.rpartition(":")
    if block in OWN_FIELDS and not _include(block, models):
        return None
    while path:
        if has_field(path.split("."), models):
            return path
        path = path.partition(".")[2]
    return None


def has_field(path: Sequence[str], models: Sequence[type[BaseModel]]) -> bool:
    """Return True if a path of names leads from a block of ``models`` to a field."""
    name, *below = path
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    if not below or not fields:
        return bool(fields)
    return has_field(below, [model for field in fields for model in nested_models(field.annotation)])
