"""The mapping of a record to the fields that formats read: ``columns``, ``system`` and ``better`` of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config.recipe.record_mapping import ColumnValue, RecordMapping, column_texts
from align.config.recipe.templates import Reference, parse_column, parse_template
from align.data.formats.column_values import column_value, filled_text
from align.data.formats.compared_columns import LabelRule, better_and_worse
from align.data.formats.fields import (
    CHOSEN,
    COMPLETIONS,
    CONVERSATIONS,
    LABELS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    TEXTS,
)
from align.data.formats.grouped_rows import grouped_settings

GROUPS = (PROMPTS, COMPLETIONS, CONVERSATIONS, RESPONSES, CHOSEN, REJECTED, LABELS, TEXTS)
"""Names of one meaning: a mapped field hides the record's own fields of the same meaning."""


@dataclass
class MappedRecord:
    """A record under the names that formats read."""

    fields: dict[str, Any]
    hidden: dict[str, Any] = field(default_factory=dict)
    """Fields of the record that a mapped one takes the place of, and that nothing else used."""


def map_record(record: Mapping[str, Any], mapping: RecordMapping, rule: LabelRule | None = None) -> MappedRecord:
    """Return the record with its columns mapped. A column that the mapping used is no field of its own any more.

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
    # Also where this record lacks the column: another field of that meaning would be another thing.
    targets = {*mapping.columns, *mapped}
    shadowed = {
        name for group in GROUPS for name in group if name not in mapped and any(other in targets for other in group)
    }
    # Unused fields stay beside the mapped ones: a format may read more of them (``tools``), the ledger names the rest.
    used = set(read_columns(mapping))
    rest = {name: value for name, value in record.items() if name not in used}
    visible = {name: value for name, value in rest.items() if name not in shadowed and name not in mapped}
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
            # A column's own name may have dots and brackets, which a path has too; the check tells them apart.
            places.setdefault(reference.column, place)


def map_columns(record: Mapping[str, Any], columns: Mapping[str, ColumnValue]) -> dict[str, Any]:
    """Return a record with its columns under other names beside their own, for readers that ignore what they lack."""
    return {**record, **{name: column_value(name, value, record) for name, value in columns.items()}}


def columns_read(columns: Mapping[str, ColumnValue]) -> dict[str, str]:
    """Return the columns that ``columns`` reads, each with the setting that first names it."""
    places: dict[str, str] = {}
    for name, value in columns.items():
        for text in column_texts(value):
            _add_columns(places, f"columns.{name}", parse_column(text).references)
    return places
