"""Questions of the evaluation sets that training rows must not contain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.recipe.evaluation_set import EvaluationSet
from align.config.recipe.step_settings import DecontaminateStep
from align.config.validation import suggest
from align.data.rows import BadRecord
from align.data.source_identity import identity
from align.data.sources import read
from align.data.steps.base import ModelLoaders
from align.errors import UserError

QUESTIONS = ("prompt", "question", "turns", "instruction", "problem", "goal", "query", "text")
"""Fields that may hold a record's question, tried in this order, in any case."""


@dataclass(frozen=True)
class Item:
    """One question of a set."""

    set: str
    place: str
    """File and line, or the record's number."""
    texts: tuple[str, ...]
    """Texts that a row must not contain; several where the question has several turns."""


def set_identities(settings: EvaluationSet, base: Path) -> dict[str, str]:
    """Return digests of a set's files; a commit of the Hub is among the settings."""
    if settings.files is None:
        return {}
    return {f"{settings.name}: {file}": digest for file, digest in identity(settings.source(), base).items()}


def evaluation_set_identities(config: DecontaminateStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return digests of the files of all sets of a step."""
    identities: dict[str, str] = {}
    for evaluation_set in config.sets:
        identities |= set_identities(evaluation_set, base)
    return identities


def read_items(settings: EvaluationSet, base: Path) -> list[Item]:
    """Return a set's questions. Raises ``UserError`` for records that have none, and for a set without records."""
    items = []
    for item in read(settings.source(), base):
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        texts = tuple(text for text in _texts(settings, record, where) if text.strip())
        if not texts:
            raise UserError(f"evaluation set '{settings.name}': {where}: the question is empty.")
        items.append(Item(settings.name, where.replace("\\", "/").rsplit("/", 1)[-1], texts))
    if not items:
        raise UserError(f"evaluation set '{settings.name}' has no records; there is nothing to look for.")
    return items


def _texts(settings: EvaluationSet, record: dict[str, Any], where: str) -> list[str]:
    """Return the texts of a record's question: one for a list of fields, else one for each turn."""
    # One field may hold several turns, which are searched one by one; several fields make one text.
    if settings.fields is not None:
        values = [_field(settings.name, record, field, where) for field in settings.fields]
        if len(values) == 1:
            return _strings(values[0], settings.name, settings.fields[0], where)
        parts = []
        for value, field in zip(values, settings.fields, strict=True):
            parts.append(" ".join(_strings(value, settings.name, field, where)))
        return ["\n".join(parts)]
    # Field names of evaluation sets differ in their case.
    names = {name.lower(): name for name in record}
    question = next((names[name] for name in QUESTIONS if record.get(names.get(name, "")) is not None), None)
    if question is None:
        raise UserError(
            f"evaluation set '{settings.name}': {where}: no field looks like a question; there are "
            f"{', '.join(sorted(record)) or 'none'}. Name it: fields: [{next(iter(sorted(record)), 'question')}]."
        )
    return _strings(record[question], settings.name, question, where)


def _field(name: str, record: dict[str, Any], path: str, where: str) -> Any:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            known = sorted(value) if isinstance(value, dict) else []
            raise UserError(
                f"evaluation set '{name}': {where}: there is no field '{path}'; there are "
                f"{', '.join(known) or 'none'}.{suggest(part, known)}"
            )
        value = value[part]
    return value


def _strings(value: Any, name: str, field: str, where: str) -> list[str]:
    """Return the texts of a field: itself, the items of a list, or the user turns of a list of messages."""
    values = value if isinstance(value, list) else [value]
    messages = [item for item in values if isinstance(item, dict)]
    if messages:
        values = [item.get("content") for item in messages if item.get("role", "user") == "user"]
    wrong = next((item for item in values if not isinstance(item, str)), None)
    if wrong is not None or not values:
        kind = type(wrong).__name__ if values else "an empty list"
        raise UserError(
            f"evaluation set '{name}': {where}: field '{field}' holds {kind}; expected text or a list of texts."
        )
    return list(values)


def read_all_items(sets: list[EvaluationSet], base: Path) -> Iterator[Item]:
    """Yield the questions of several sets, set after set."""
    for settings in sets:
        yield from read_items(settings, base)
