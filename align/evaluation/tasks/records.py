"""Records of a task: reading them from files or the Hub, and choosing among them. Torch-free.

Each task knows the meaning of its benchmark's records.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from align.config.recipe.record_mapping import ColumnValue
from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.stages.evaluation.task_fields import RecordFields, TaskConfig
from align.config.validation import hint_nearest, validate_plain
from align.data.formats.messages import is_number
from align.data.rows import Message
from align.errors import UserError

AnyRecord = TypeVar("AnyRecord")


class TaskRecord(dict[str, Any]):
    """A record's fields and its location.

    Indexing with a missing field raises a ``UserError`` with the location; ``get`` does not, as in any dict.
    """

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.where = where
        """``file:line``, or the record's number."""

    def __missing__(self, field: str) -> Any:
        raise UserError(
            f"{self.where}: there is no field '{field}'; there are {', '.join(sorted(self)) or 'none'}."
            f"{hint_nearest(field, self)}"
        )

    def text(self, field: str) -> str:
        """Return a field that must hold text that is not blank; a number is its digits."""
        value = self[field]
        if is_number(value):
            return str(value)
        if not isinstance(value, str):
            raise self.field_error(field, "text")
        if not value.strip():
            raise UserError(f"{self.where}: field '{field}' is empty; expected text. Complete or delete the record.")
        return value

    def texts(self, field: str) -> list[str]:
        """Return a field that must hold a list of texts, at least one; numbers are their digits."""
        value = self[field]
        items = value if isinstance(value, list) else []
        if not items or not all(isinstance(item, str) or is_number(item) for item in items):
            raise self.field_error(field, "a list of texts")
        return [str(item) for item in items]

    def messages(self, field: str) -> list[Message] | None:
        """Return a field that holds a list of messages, each with role and content; None for anything else."""
        value = self[field]
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            return None
        contents = [message.get(name) for message in value for name in ("role", "content")]
        return value if all(isinstance(content, str) for content in contents) else None

    def field_error(self, field: str, expected: str) -> UserError:
        """Return the error for a field of another type than ``expected``."""
        value = self[field]
        actual = "an empty list" if value == [] else f"{type(value).__name__} ({_short_repr(value)})"
        return UserError(f"{self.where}: field '{field}' holds {actual}; expected {expected}.")


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def record_source(config: RecordFields) -> FilesSource | HubSource:
    """Return the source of a task's records: its files, or its dataset with the benchmark's defaults."""
    mapping = config.record_mapping()
    if config.files is not None:
        return FilesSource(type="files", paths=config.files, **mapping)
    defaults = config.hub_defaults() or {}
    # Another dataset must not inherit the benchmark's configuration and commit.
    if config.dataset is not None and config.dataset != defaults.get("dataset"):
        defaults = {"dataset": config.dataset}
    fields = {"config": config.config, "split": config.split, "revision": config.revision}
    overrides = {name: value for name, value in fields.items() if value is not None}
    return validate_plain(HubSource, {"type": "hub", "split": "test", **defaults, **overrides, **mapping})


def file_identities(config: RecordFields, base: Path) -> dict[str, str]:
    """Return digests of the files by name, with files of examples; a Hub dataset's commit is among the settings.

    Raises ``UserError`` if a file is missing.
    """
    from align.data.sources import identity

    digests = {} if config.files is None else identity(record_source(config), base)
    examples_files = getattr(config, "examples_files", None)
    if examples_files is not None:
        examples = identity(FilesSource(type="files", paths=examples_files), base)
        digests |= {f"examples: {name}": digest for name, digest in examples.items()}
    return digests


def reported_sources(task: TaskConfig, base: Path) -> dict[str, str]:
    """Return the files of a task's items by their digests, or the dataset by its name and split."""
    if not isinstance(task, RecordFields):
        return {}
    if task.files is not None:
        files = file_identities(task, base)
        return {digest: name for name, digest in files.items() if not name.startswith("examples: ")}
    if task.revision is None:
        return {}
    source = record_source(task)
    return {f"{source.label} {getattr(source, 'split', '')}": source.label}


def examples_source(config: Any) -> FilesSource | HubSource | None:
    """Return the source of solved examples, from ``examples_files`` or ``examples_split``; None without."""
    if config.examples_files is not None:
        return FilesSource(type="files", paths=config.examples_files, **config.record_mapping())
    if config.examples_split is None or config.files is not None:
        return None
    return record_source(config).model_copy(update={"split": config.examples_split})


def read_examples(config: Any, base: Path) -> list[TaskRecord]:
    """Return the records of the solved examples; empty without a source of examples."""
    source = examples_source(config)
    return [] if source is None else read_records(source, base, config.columns)


def load_records(config: RecordFields, base: Path, seed: int) -> list[TaskRecord]:
    """Return the task's records, at most ``max_items`` of them.

    Raises ``UserError`` for files or a dataset that cannot be read, for a broken record, and if there is none.
    """
    return draw(read_records(record_source(config), base, config.columns), config.max_items, seed)


def describe_records(config: RecordFields, base: Path) -> dict[str, Any]:
    """Return what identifies the records: digests of files, or the dataset and its commit. JSON-able."""
    source = record_source(config)
    if isinstance(source, HubSource):
        fields = {"dataset": source.dataset, "config": source.config, "split": source.split}
        description: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        description["revision"] = source.revision
    else:
        from align.data.sources import identity

        description = {"files": identity(source, base)}
    if config.max_items is not None:
        description["max_items"] = config.max_items
    return description


def read_records(
    source: FilesSource | HubSource, base: Path, columns: Mapping[str, ColumnValue] | None = None
) -> list[TaskRecord]:
    """Return all records of a source, with the columns that a task maps in addition to their own.

    Raises ``UserError`` for the first broken record, for a column that no record has, and if there is no record.
    """
    from align.data.formats.fields import Malformed
    from align.data.formats.mapping import columns_read, map_columns
    from align.data.rows import BadRecord
    from align.data.sources import check_columns, read

    columns = columns or {}
    records = []
    for item in check_columns(source.label, columns_read(columns), read(source, base)):
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        try:
            records.append(TaskRecord(where, map_columns(record, columns)))
        except Malformed as error:
            raise UserError(f"{where}: {error}.") from None
    if not records:
        raise UserError(f"{source.label}: there are no records in it (paths start at {base}); nothing to evaluate.")
    return records


def draw(records: list[AnyRecord], limit: int | None, seed: int) -> list[AnyRecord]:
    """Draw at most ``limit`` records without replacement, and return them in their order."""
    if limit is None or limit >= len(records):
        return records
    picked = random.Random(seed).sample(range(len(records)), limit)  # noqa: S311
    return [records[index] for index in sorted(picked)]


def item_ids(records: list[TaskRecord], field: str | None = None) -> list[str]:
    """Return a distinct name for each record: the value of ``field``, else its file and line.

    Neither depends on which records are drawn.
    """
    ids: dict[str, None] = {}
    for record in records:
        value = None if field is None else record.get(field)
        name = str(value) if value not in (None, "") else record.where.replace("\\", "/").rsplit("/", 1)[-1]
        ids[distinct_name(name, ids)] = None
    return list(ids)


def distinct_name(name: str, names: Container[str]) -> str:
    """Return the name, with a number if it is among ``names``."""
    distinct = name
    number = 2
    while distinct in names:
        distinct = f"{name} ({number})"
        number += 1
    return distinct


def numbered_ids(ids: Sequence[str]) -> list[str]:
    """Return the ids with ``-2``, ``-3`` and so on after each repetition, so they are distinct."""
    counts: Counter[str] = Counter()
    distinct = []
    for id in ids:
        counts[id] += 1
        distinct.append(id if counts[id] == 1 else f"{id}-{counts[id]}")
    return distinct
