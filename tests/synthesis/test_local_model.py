"""Texts of local models, whose thoughts later readers must be able to tell from the answers."""

from __future__ import annotations

import pytest

from align.data.final_answers import split_thought
from align.inference.protocol import Response
from align.synthesis.local_model import with_tags


@pytest.mark.parametrize(
    ("text", "thought_end", "is_open", "expected"),
    [
        ("thought\nTwo and two.\nIt is 4.", 21, False, "<think>\nTwo and two.\n</think>\n\nIt is 4."),
        ("thought\nTwo and two", 19, True, "<think>\nTwo and two"),
        ("<think>\nHm.\n</think>\n\nIt is 4.", 22, False, "<think>\nHm.\n</think>\n\nIt is 4."),
        ("It is 4.", 0, False, "It is 4."),
    ],
)
def test_thoughts_without_marks_get_tags(text: str, thought_end: int, is_open: bool, expected: str) -> None:
    response = Response([], [], finished=not is_open, text=text, thought_end=thought_end, is_open=is_open)
    assert with_tags(response) == expected
    assert str(split_thought(expected)) == str(response.answer_text)
