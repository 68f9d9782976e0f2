"""Helpers for the tests of formats."""

from __future__ import annotations

from typing import Any

from align.config.recipe.format_options import FormatOptions
from align.config.recipe.record_mapping import RecordMapping
from align.data.formats import SourceFormat, convert
from align.data.rows import Dropped, Row, assistant, user


def chat(*contents: str) -> list[dict[str, str]]:
    """Return alternating turns of user and assistant."""
    return [(user if index % 2 == 0 else assistant)(content) for index, content in enumerate(contents)]


def sharegpt(*contents: str) -> list[dict[str, str]]:
    """Return the same turns in ShareGPT's format."""
    return [{"from": ("human", "gpt")[index % 2], "value": content} for index, content in enumerate(contents)]


def source_format(form: Any, **settings: Any) -> SourceFormat:
    """Return a format with the settings of its options and of its mapping, by their names."""
    options = {name: value for name, value in settings.items() if name in FormatOptions.model_fields}
    mapping = {name: value for name, value in settings.items() if name not in options}
    return SourceFormat(form, FormatOptions(**options), RecordMapping(**mapping))


def rows(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> list[Row]:
    """Return all rows of a record without their ids, and check that none is dropped."""
    results = convert(record, source_format(form, **options), "f:1", kind)
    converted = [row for row in results if not isinstance(row, Dropped)]
    assert len(converted) == len(results) > 0, results
    assert all(len(row.pop("id")) == 16 for row in converted)
    return converted


def row(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> Row:
    """Return the single row of a record, without its id."""
    (single,) = rows(record, form, kind, **options)
    return single


def dropped(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> str:
    """Return the reason why the record makes no row."""
    (result,) = convert(record, source_format(form, **options), "f:1", kind)
    assert isinstance(result, Dropped), result
    return result.reason
