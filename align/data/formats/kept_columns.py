"""Columns of a record that stay with its rows: ``keep`` of a source."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.config.recipe.record_mapping import ROW_FIELDS, RecordMapping, describe_taken_name
from align.config.recipe.templates import parse_column
from align.data.formats.column_values import filled, label_number
from align.data.formats.fields import Malformed
from align.errors import UserError


def kept_fields(record: Mapping[str, Any], mapping: RecordMapping, read: Iterable[str]) -> dict[str, Any]:
    """Return the columns that stay with the row, as JSON has them; an absent one is left out.

    ``read`` are the fields that the format reads itself, which ``keep: all`` leaves out. Raises ``Malformed`` for a
    value that is no text, number, list or mapping; ``UserError`` for a column of ``all`` with one of align's own names.
    """
    fields: dict[str, Any] = {}
    if mapping.keep == "all":
        texts = [value for value in mapping.columns.values() if isinstance(value, str)]
        if mapping.better is not None:
            texts += [mapping.better.a, mapping.better.b]
        # A column that became a field as it is need not be there twice; one that a template quotes stays.
        names = [name for name in record if name not in read and name not in texts]
        for name in names:
            if name in ROW_FIELDS or name.startswith("_"):
                raise UserError(_describe_collision(name, names))
        columns = {name: name for name in names}
    else:
        columns = mapping.kept_columns()
    for name, text in columns.items():
        value = record.get(text) if text in record else filled(name, text, record)
        if value is not None:
            fields[name] = _plain(value, name)
    return fields


def kept_sources(mapping: RecordMapping) -> set[str]:
    """Return the columns of the record that ``keep`` names."""
    templates = [parse_column(text) for text in mapping.kept_columns().values()]
    return {reference.column for template in templates for reference in template.references}


def read_checks(record: dict[str, Any]) -> str:
    """Return the record's ``checks`` for a program that checks answers, as JSON text; ``""`` where it has none.

    A field of that name that is no JSON object means something else, and stays unread.
    """
    value = dict.get(record, "checks")
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    else:
        parsed = value
    if not isinstance(parsed, dict) or not parsed:
        return ""
    record["checks"]
    return value if isinstance(value, str) else json.dumps(_plain(parsed, "checks"), ensure_ascii=False)


def _describe_collision(name: str, names: Sequence[str]) -> str:
    free = [column for column in names if column not in ROW_FIELDS and not column.startswith("_")]
    listed = ", ".join(f"{column}: {column}" for column in free[:20])
    renamed = f"record_{name.lstrip('_')}: {name}"
    return (
        f"keep: all would keep a column '{name}'; {describe_taken_name(name).partition('. ')[0].partition(' ')[2]}. "
        f"Write the columns, and rename this one: keep: {{{', '.join(filter(None, (listed, renamed)))}}}"
    )


def _plain(value: Any, name: str) -> Any:
    """Return a value of JSON: dates become text, numbers of other libraries become Python's."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, (bytes, bytearray)):
        raise Malformed(f"keep: '{name}' holds {type(value).__name__}; text, numbers, lists and mappings can be kept")
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    number = label_number(value)
    if number is None:
        raise Malformed(f"keep: '{name}' holds {type(value).__name__}; text, numbers, lists and mappings can be kept")
    return number
