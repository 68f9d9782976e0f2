"""The mapping of a record to the fields that formats read: ``columns``, ``system`` and ``better`` of a source."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config.recipe.record_mapping import ColumnValue, GroupedRows, Mean, RecordMapping, column_texts
from align.config.recipe.templates import Reference, parse_column, parse_template
from align.data.formats.columns import (
    LabelRule,
    better_and_worse,
    column_value,
    filled,
    filled_text,
    label_number,
    mean_value,
)
from align.data.formats.fields import (
    CHOSEN,
    COMPLETIONS,
    CONVERSATIONS,
    LABELS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    TEXTS,
    Malformed,
)
from align.data.formats.reading import Item
from align.data.rows import BadRecord

GROUPS = (PROMPTS, COMPLETIONS, CONVERSATIONS, RESPONSES, CHOSEN, REJECTED, LABELS, TEXTS)
"""Names of one meaning: a mapped field hides the record's own fields of the same meaning."""


@dataclass
class MappedRecord:
    """A record under the names that formats read."""

    fields: dict[str, Any]
    hidden: dict[str, Any] = field(default_factory=dict)
    """Fields of the record that a mapped field replaces, and that no other setting used."""


def map_record(record: Mapping[str, Any], mapping: RecordMapping, rule: LabelRule | None = None) -> MappedRecord:
    """Return the record with its columns mapped. A column that the mapping used is not a separate field any more.

    Raises ``Malformed`` for a record without a column that it needs, and for a label that the rule does not know;
    ``Unusable`` for a tie.
    """
    if not (mapping.columns or mapping.system or mapping.better):
        return MappedRecord(dict(record))
    mapped = {
        name: filled_value
        for name, value in mapping.columns.items()
        if (filled_value := column_value(name, value, record)) is not None
    }
    if mapping.system is not None:
        mapped["system"] = filled_text("system", mapping.system, record)
    if mapping.better is not None:
        mapped |= better_and_worse(mapping.better, record, rule or LabelRule())
    # Also if this record lacks the column: another field of that meaning would be another thing.
    targets = {*mapping.columns, *mapped}
    shadowed = set(mapped)
    for group in GROUPS:
        if not targets.isdisjoint(group):
            shadowed.update(group)
    # Unused fields stay with the mapped fields: a format may read more of them (``tools``), the ledger names the rest.
    used = set(read_columns(mapping))
    rest = {name: value for name, value in record.items() if name not in used}
    visible = {name: value for name, value in rest.items() if name not in shadowed}
    hidden = {name: value for name, value in rest.items() if name not in visible}
    return MappedRecord(visible | mapped, hidden)


def read_columns(mapping: RecordMapping) -> dict[str, str]:
    """Return the columns that a mapping reads, each with the setting that first names it."""
    places = columns_read(mapping.columns)
    if mapping.better is not None:
        for side in ("label", "a", "b"):
            _add_columns(places, f"better.{side}", parse_column(getattr(mapping.better, side)).references)
    if mapping.system is not None:
        _add_columns(places, "system", parse_template(mapping.system).references)
    return places


def named_columns(mapping: RecordMapping) -> dict[str, str]:
    """Return all columns that a source's settings name and that some record must have, with the setting's place."""
    places: dict[str, str] = {}
    if mapping.grouped is not None:
        for place, text in grouped_settings(mapping.grouped):
            _add_columns(places, place, parse_column(text).references)
    for name, place in read_columns(mapping).items():
        places.setdefault(name, place)
    for text in mapping.kept_columns().values():
        _add_columns(places, "keep", parse_column(text).references)
    return places


def _add_columns(places: dict[str, str], place: str, references: Iterable[Reference]) -> None:
    for reference in references:
        if not reference.is_optional:
            # A column's own name may have dots and brackets, as a path has; the check tells them apart.
            places.setdefault(reference.column, place)


def map_columns(record: Mapping[str, Any], columns: Mapping[str, ColumnValue]) -> dict[str, Any]:
    """Return a record that also has its columns under other names, for readers that ignore what they lack."""
    return {**record, **{name: column_value(name, value, record) for name, value in columns.items()}}


def columns_read(columns: Mapping[str, ColumnValue]) -> dict[str, str]:
    """Return the columns that ``columns`` reads, each with the setting that first names it."""
    places: dict[str, str] = {}
    for name, value in columns.items():
        for text in column_texts(value):
            _add_columns(places, f"columns.{name}", parse_column(text).references)
    return places


def grouped_settings(grouped: GroupedRows) -> list[tuple[str, str]]:
    """Return the settings that name columns, and the columns."""
    settings = [("grouped.by", grouped.by), ("grouped.answer", grouped.answer)]
    if isinstance(grouped.score, str):
        settings.append(("grouped.score", grouped.score))
    elif isinstance(grouped.score, Mean):
        settings.append(("grouped.score", grouped.score.mean))
    elif grouped.score is not None:
        settings += [("grouped.score", name) for name in grouped.score]
    if grouped.rank is not None:
        settings.append(("grouped.rank", grouped.rank))
    return settings


@dataclass
class _Group:
    where: str
    fields: dict[str, Any]
    responses: list[dict[str, Any]] = field(default_factory=list)


def group_records(grouped: GroupedRows, records: Iterator[Item]) -> Iterator[Item]:
    """Yield a record for each prompt, in the order of their first records, with all its answers as ``responses``.

    The other fields are those that all records of the prompt share. A record that cannot be read stays in its place.
    """
    groups: dict[str, _Group] = {}
    for item in records:
        if isinstance(item, BadRecord):
            yield item
            continue
        where, record = item
        try:
            key = json.dumps(filled("grouped.by", grouped.by, record), default=str)
            response = _response(grouped, record)
        except Malformed as error:
            yield BadRecord(where, f"{error}.")
            continue
        # Records of one prompt need not follow each other, so all groups stay open until the end.
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(where, dict(record))
        else:
            group.fields = {name: value for name, value in group.fields.items() if record.get(name) == value}
        group.responses.append(response)
    used = [text for place, text in grouped_settings(grouped) if place != "grouped.by"]
    columns = {reference.column for text in used for reference in parse_column(text).references}
    for group in groups.values():
        fields = {name: value for name, value in group.fields.items() if name not in columns}
        yield group.where, {**fields, "responses": group.responses}


def _response(grouped: GroupedRows, record: Mapping[str, Any]) -> dict[str, Any]:
    content = filled("grouped.answer", grouped.answer, record)
    if content is None:
        raise Malformed(f"it has no answer in '{grouped.answer}'")
    if grouped.rank is not None:
        return {"content": content, "rank": _number(grouped.rank, record)}
    if isinstance(grouped.score, Mean):
        mean = mean_value("grouped.score", grouped.score, record)
        if not isinstance(mean, float):
            raise Malformed(f"'{grouped.score.mean}' has no numbers to take the mean of")
        return {"content": content, "score": mean}
    weights = {grouped.score: 1.0} if isinstance(grouped.score, str) else grouped.score or {}
    total = math.fsum(weight * _number(name, record) for name, weight in weights.items())
    return {"content": content, "score": total}


def _number(column: str, record: Mapping[str, Any]) -> float:
    value = parse_column(column).value(record)
    number = label_number(value)
    if number is None:
        raise Malformed(f"'{column}' holds {value!r}, expected a number")
    return number
