"""Evaluation sets that training rows must not contain: their settings, and their questions as texts.

Known names need only a commit of the Hub; files serve where there is no network. Left out: how answers are judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.validation import suggest, validate_plain
from align.data.source_configs import FilesSource, HubSource
from align.errors import UserError

HUB = {
    "arc_challenge": {"dataset": "allenai/ai2_arc", "config": "ARC-Challenge", "split": "test"},
    "arc_easy": {"dataset": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"},
    "gsm8k": {"dataset": "openai/gsm8k", "config": "main", "split": "test"},
    "ifeval": {"dataset": "google/IFEval", "split": "train"},
    "mmlu": {"dataset": "cais/mmlu", "config": "all", "split": "test"},
    "mt_bench": {"dataset": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
    "truthfulqa": {"dataset": "truthfulqa/truthful_qa", "config": "generation", "split": "validation"},
    "xstest": {"dataset": "walledai/XSTest", "split": "test"},
}
"""Where the Hub keeps the sets that are known by name."""
QUESTIONS = ("prompt", "question", "turns", "instruction", "problem", "goal", "query", "text")
"""Fields that a record's question may stand in, tried in this order, in any case."""


class EvaluationSet(Config):
    """One evaluation set."""

    name: str = Field(min_length=1, max_length=100)
    """What the ledger calls it. With a known name (arc_challenge, arc_easy, gsm8k, ifeval, mmlu, mt_bench, truthfulqa,
    xstest) ``revision`` says enough."""
    files: list[str] | None = Field(None, min_length=1)
    """Paths or globs of its files, relative to the current directory, instead of the Hub."""
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name on the Hub of a set that is not known by name."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The dataset's commit, 40 hexadecimal digits."""
    config: str | None = None
    """The dataset's configuration (subset) where it has several."""
    split: str | None = None
    """The dataset's split; ``test`` by default, or what is usual for a known name."""
    fields: list[str] | None = Field(None, min_length=1)
    """Fields that make up the question, joined by a line break; ``a.b`` is field b of a. By default the first there is
    of prompt, question, turns, instruction, problem, goal, query, text. The texts of a list count one by one."""

    identified: ClassVar[frozenset[str]] = frozenset({"files"})

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.files is not None:
            given = [name for name in ("dataset", "revision", "config", "split") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"evaluation set '{self.name}' has files, so '{given[0]}' means nothing; drop one of them"
                )
        elif self.dataset is None and self.name not in HUB:
            raise ValueError(
                f"evaluation set '{self.name}': give its files, or its dataset and revision on the Hub; known by name "
                f"are {', '.join(HUB)}.{suggest(self.name, HUB)}"
            )
        elif self.revision is None:
            raise ValueError(
                f"evaluation set '{self.name}' needs `revision`, the commit of "
                f"{self.dataset or HUB[self.name]['dataset']} on the Hub (40 hexadecimal digits), or `files`"
            )
        return self

    def source(self) -> FilesSource | HubSource:
        """Where its records are."""
        if self.files is not None:
            return FilesSource(type="files", paths=self.files)
        usual = HUB.get(self.name, {}) if self.dataset is None else {"dataset": self.dataset}
        given = {"config": self.config, "split": self.split, "revision": self.revision}
        settings = {"split": "test", **usual, **{name: value for name, value in given.items() if value is not None}}
        return validate_plain(HubSource, {"type": "hub", **settings})

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of its files; a commit of the Hub is among the settings."""
        if self.files is None:
            return {}
        from align.data.sources import identity

        return {f"{self.name}: {file}": digest for file, digest in identity(self.source(), base).items()}


@dataclass(frozen=True)
class Item:
    """One question of a set."""

    set: str
    place: str
    """File and line, or the record's number."""
    texts: tuple[str, ...]
    """What a row must not contain; several where the question has several turns."""


def read_items(settings: EvaluationSet, base: Path) -> list[Item]:
    """A set's questions. Raises ``UserError`` for records that have none, and for a set without records."""
    from align.data.sources import BadRecord, read

    items = []
    for found in read(settings.source(), base):
        if isinstance(found, BadRecord):
            raise found
        where, record = found
        texts = tuple(text for text in _texts(settings, record, where) if text.strip())
        if not texts:
            raise UserError(f"evaluation set '{settings.name}': {where}: the question is empty.")
        items.append(Item(settings.name, where.replace("\\", "/").rsplit("/", 1)[-1], texts))
    if not items:
        raise UserError(f"evaluation set '{settings.name}' has no records; there is nothing to look for.")
    return items


def _texts(settings: EvaluationSet, record: dict[str, Any], where: str) -> list[str]:
    if settings.fields is not None:
        values = [_field(settings.name, record, field, where) for field in settings.fields]
        if len(values) == 1:
            return _strings(values[0], settings.name, settings.fields[0], where)
        parts = [
            " ".join(_strings(value, settings.name, field, where))
            for value, field in zip(values, settings.fields, strict=True)
        ]
        return ["\n".join(parts)]
    names = {name.lower(): name for name in record}
    field = next((names[name] for name in QUESTIONS if record.get(names.get(name, "")) is not None), None)
    if field is None:
        raise UserError(
            f"evaluation set '{settings.name}': {where}: no field looks like a question; there are "
            f"{', '.join(sorted(record)) or 'none'}. Name it: fields: [{next(iter(sorted(record)), 'question')}]."
        )
    return _strings(record[field], settings.name, field, where)


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
    """The texts of a field: itself, the items of a list, or the user turns of a list of messages."""
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


def all_items(sets: list[EvaluationSet], base: Path) -> Iterator[Item]:
    """The questions of several sets, set after set."""
    for settings in sets:
        yield from read_items(settings, base)
