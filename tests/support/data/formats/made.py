"""Short hands for the tests of formats."""

from __future__ import annotations

from typing import Any

from align.data.formats import FormatOptions, convert
from align.data.rows import Dropped, Row, assistant, user


def chat(*contents: str) -> list[dict[str, str]]:
    """Turns of user and assistant by turns."""
    return [(user if at % 2 == 0 else assistant)(content) for at, content in enumerate(contents)]


def sharegpt(*contents: str) -> list[dict[str, str]]:
    """The same in ShareGPT's spelling."""
    return [{"from": ("human", "gpt")[at % 2], "value": content} for at, content in enumerate(contents)]


def rows(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> list[Row]:
    """All rows of a record, which must not drop any; without ids."""
    found = convert(record, form, "f:1", kind, FormatOptions(**options))
    kept = [row for row in found if not isinstance(row, Dropped)]
    assert len(kept) == len(found) > 0, found
    assert all(len(row.pop("id")) == 16 for row in kept)
    return kept


def row(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> Row:
    """The one row of a record, without its id."""
    (found,) = rows(record, form, kind, **options)
    return found


def dropped(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> str:
    """Why the record makes no row."""
    (found,) = convert(record, form, "f:1", kind, FormatOptions(**options))
    assert isinstance(found, Dropped), found
    return found.reason
