"""Align's own rows in files: rows as builds write them, OpenAI's lists of calls, and what rows do not have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.formats import SourceFormat, convert
from align.data.rows import BadRecord, assistant, user
from tests.support.data.formats.conversions import row

CALLS = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]


def test_a_list_of_calls_becomes_text() -> None:
    turns = [user("2+2?"), assistant("") | {"tool_calls": CALLS}, {"role": "tool", "content": "4"}]
    read = row({"prompt": turns, "completion": [assistant("4")]}, "rows")
    assert json.loads(read["prompt"][1]["tool_calls"]) == CALLS
    assert turns[1]["tool_calls"] is CALLS, "the record stays as it is"
    assert row(read, "rows") == read


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"responses": ["a", "b"]}, "'responses' holds something else than a list of answers"),
        ({"responses": [{"content": None}]}, "'responses' holds something else"),
        ({"completion": "text"}, "'completion' holds str, and rows have lists of messages"),
        ({"completion": [assistant("a") | {"tool_calls": {"name": "f"}}]}, "whose tool_calls holds dict, not text"),
        ({"completion": [assistant("a") | {"name": 5}]}, "whose name holds int, not text"),
        ({"completion": [assistant("a") | {"train": "no"}]}, "whose train is 'no', not true or false"),
        ({"_where": "x"}, "'_where' begins with _"),
    ],
)
def test_fields_that_rows_do_not_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        convert({"prompt": [user("q")], **fields}, SourceFormat("rows"), "f:1", "instructions")
