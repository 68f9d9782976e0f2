"""Where a task's records are (files, or a dataset of the Hub at one commit), and which of them are taken. Torch-free.

Left out: what the records mean, which every task knows for its own benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.validation import nearest, validate_plain
from align.data.evaluation_sets import HUB
from align.data.source_configs import FilesSource, HubSource
from align.errors import UserError

Some = TypeVar("Some")


class TaskRecord(dict[str, Any]):
    """A record's fields, and the place where it stands.

    Asking for a field that is not there raises a ``UserError`` with the place; ``get`` does not, as in any dict.
    """

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.where = where
        """``file:line``, or the record's number."""

    def __missing__(self, field: str) -> Any:
        close = nearest(field, self)
        raise UserError(
            f"{self.where}: there is no field '{field}'; there are {', '.join(sorted(self)) or 'none'}."
            + (f" Did you mean '{close}'?" if close else "")
        )

    def text(self, field: str) -> str:
        """A field that must hold text with more than space in it."""
        value = self[field]
        if not isinstance(value, str):
            raise self.wrong(field, "text")
        if not value.strip():
            raise UserError(f"{self.where}: field '{field}' is empty; expected text. Complete or delete the record.")
        return value

    def texts(self, field: str) -> list[str]:
        """A field that must hold a list of texts, at least one."""
        value = self[field]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.wrong(field, "a list of texts")
        return list(value)

    def wrong(self, field: str, expected: str) -> UserError:
        """The error for a field of another kind than ``expected``."""
        value = self[field]
        what = "an empty list" if value == [] else f"{type(value).__name__} ({_short(value)})"
        return UserError(f"{self.where}: field '{field}' holds {what}; expected {expected}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class TaskData(Config):
    """Fields of a task that reads records; a task's config inherits them beside ``TaskConfig``, this one first."""

    files: list[str] | None = Field(None, min_length=1)
    """Paths or globs of its files (.json, .jsonl, .csv, .tsv, .parquet, the text ones also packed), instead of the Hub;
    relative to the current directory."""
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name on the Hub; by default the benchmark's usual place, where it has one."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The dataset's commit, 40 hexadecimal digits, so that the numbers always mean the same records."""
    config: str | None = None
    """The dataset's configuration (subset) where it has several."""
    split: str | None = None
    """The dataset's split; ``test`` by default, or what is usual for a known benchmark."""
    max_items: int | None = Field(None, ge=1)
    """Take at most this many records, drawn by the run's seed and left in their order; fewer make wider intervals."""

    identified: ClassVar[frozenset[str]] = frozenset({"files"})

    def usual(self) -> Mapping[str, str] | None:
        """The benchmark's usual place on the Hub (``dataset``, ``config``, ``split``), by the task's kind here."""
        return HUB.get(str(getattr(self, "task", "")))

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = ("dataset", "revision", "config", "split")
        given = [name for name in places if getattr(self, name) is not None]
        if self.files is not None:
            if given:
                raise ValueError(f"it has files, so '{given[0]}' means nothing; drop one of them")
            return self
        usual = self.usual()
        dataset = self.dataset or (usual or {}).get("dataset")
        if dataset is None:
            raise ValueError("give its files, or its dataset and revision on the Hub")
        if self.revision is None:
            raise ValueError(
                f"give its files, or `revision`: the commit of {dataset} on the Hub (40 hexadecimal digits)"
            )
        return self

    def source(self) -> FilesSource | HubSource:
        """Where the records are."""
        if self.files is not None:
            return FilesSource(type="files", paths=self.files)
        usual = self.usual() or {}
        if self.dataset is not None and self.dataset != usual.get("dataset"):
            usual = {"dataset": self.dataset}
        given = {"config": self.config, "split": self.split, "revision": self.revision}
        settings = {"split": "test", **usual, **{name: value for name, value in given.items() if value is not None}}
        return validate_plain(HubSource, {"type": "hub", **settings})

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the files by name; a commit of the Hub is among the settings. Raises ``UserError`` for none."""
        from align.data.sources import identity

        return {} if self.files is None else identity(self.source(), base)

    def records(self, base: Path, seed: int) -> list[TaskRecord]:
        """The records, at most ``max_items`` of them.

        Raises ``UserError`` for files or a dataset that cannot be read, for a record that is broken, and for none.
        """
        source = self.source()
        return draw(read_records(source, base), self.max_items, seed)

    def described(self, base: Path) -> dict[str, Any]:
        """What a reader needs to find the same records: digests of files, or the dataset and its commit. JSON-able."""
        source = self.source()
        if isinstance(source, HubSource):
            named = {"dataset": source.dataset, "config": source.config, "split": source.split}
            found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
            found["revision"] = source.revision
        else:
            from align.data.sources import identity

            found = {"files": identity(source, base)}
        return found if self.max_items is None else {**found, "max_items": self.max_items}


def read_records(source: FilesSource | HubSource, base: Path) -> list[TaskRecord]:
    """All records of a source. Raises ``UserError`` for the first that cannot be read, and where there are none."""
    from align.data.sources import BadRecord, read

    found = []
    for item in read(source, base):
        if isinstance(item, BadRecord):
            raise item
        found.append(TaskRecord(*item))
    if not found:
        raise UserError(f"{source.label}: there are no records in it (looked from {base}); nothing could be asked.")
    return found


def draw(records: list[Some], most: int | None, seed: int) -> list[Some]:
    """At most ``most`` records, drawn without replacement and left in their order."""
    if most is None or most >= len(records):
        return records
    picked = random.Random(seed).sample(range(len(records)), most)  # noqa: S311
    return [records[index] for index in sorted(picked)]


def item_ids(records: list[TaskRecord], field: str | None = None) -> list[str]:
    """A name for each record, all different: what ``field`` holds, else its file and line, which no draw changes."""
    found: dict[str, None] = {}
    for record in records:
        given = None if field is None else record.get(field)
        name = str(given) if given not in (None, "") else record.where.replace("\\", "/").rsplit("/", 1)[-1]
        unique, number = name, 2
        while unique in found:
            unique, number = f"{name} ({number})", number + 1
        found[unique] = None
    return list(found)
