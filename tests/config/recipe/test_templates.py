"""Templates over a record's fields: paths, absent values, and nothing but data."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.recipe.templates import parse_column, parse_template

RECORD: dict[str, Any] = {
    "question": "2 + 2?",
    "answer": 4,
    "ok": True,
    "hint": None,
    "choices": [{"text": "three"}, {"text": "four"}],
    "meta": {"level 2": {"n": 0.5}},
    "Best Answer": "four",
    "a.b": "dotted",
    "cell": '{"options": ["x", "y"]}',
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question} #### {answer}", "2 + 2? #### 4"),
        ("{choices[0].text}/{choices[-1].text}", "three/four"),
        ("{meta.level 2.n} {meta[level 2][n]}", "0.5 0.5"),
        ("{Best Answer}, {ok}", "four, true"),
        ("{a.b}!", "dotted!"),
        ("{cell.options[1]}.", "y."),
        ("{hint?}{nothing?}|{{question}}", "|{question}"),
        ("plain", "plain"),
    ],
)
def test_a_template_quotes_the_record(template: str, text: str) -> None:
    assert parse_template(template).render(RECORD) == text


def test_a_single_field_is_its_value_and_a_plain_name_a_column() -> None:
    assert parse_column("{choices}").value(RECORD) == RECORD["choices"]
    assert parse_column("Best Answer").value(RECORD) == "four"
    assert parse_column("a.b").value(RECORD) == "dotted"
    assert parse_column("meta.n").value(RECORD) is None  # a plain name is no path
    assert parse_column("{question}?").value(RECORD) == "2 + 2??"
