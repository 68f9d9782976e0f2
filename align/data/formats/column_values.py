"""Values of a record's columns and templates, with the name of the setting in every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.config.recipe.record_mapping import ColumnValue, Constant
from align.config.recipe.templates import MissingValue, parse_column, parse_template
from align.data.formats.fields import Malformed


def column_value(name: str, value: ColumnValue, record: Mapping[str, Any]) -> Any:
    """Return the value that ``columns`` gives a field: a list for a list of columns, without empty ones at its end."""
    if isinstance(value, Constant):
        return value.constant
    if isinstance(value, str):
        return filled(name, value, record)
    items = [filled(name, text, record) for text in value]
    # Rows with fewer choices leave the last columns empty.
    while items and items[-1] in (None, ""):
        items.pop()
    return items


def filled(name: str, text: str, record: Mapping[str, Any]) -> Any:
    """Return the value of a column or template for the setting ``name``; None where the column has none.

    Raises ``Malformed`` for a template that the record cannot fill.
    """
    try:
        return parse_column(text).value(record)
    except MissingValue as error:
        raise Malformed(f"'{name}' cannot be filled: {error}") from None


def filled_text(name: str, text: str, record: Mapping[str, Any]) -> str:
    """Return a text that may quote columns. Raises ``Malformed`` where the record cannot fill it."""
    try:
        return parse_template(text).render(record)
    except MissingValue as error:
        raise Malformed(f"'{name}' cannot be filled: {error}") from None
