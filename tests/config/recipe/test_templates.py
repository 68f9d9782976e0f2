"""Templates over a record's fields: paths, absent values, and nothing but data."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.recipe.templates import MissingValue, parse_column, parse_template

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


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{missing}.", "there is no value for '{missing}'; write '{missing?}' if it may be absent"),
        ("{hint}.", "no value for '{hint}'"),
        ("{choices[7].text}.", "no value for"),
        ("{choices}.", "holds list, not text; name a value inside it, like {choices[0]}"),
        ("{meta}.", "holds dict, not text"),
        # attributes and methods of Python objects are no data
        ("{question.__class__}.", "no value for"),
        ("{choices.append}.", "no value for"),
        ("{ok.real}.", "no value for"),
    ],
)
def test_a_value_that_is_no_text_is_an_error(template: str, problem: str) -> None:
    with pytest.raises(MissingValue) as caught:
        parse_template(template).render(RECORD)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{question", "has a single '{'"),
        ("question}", "has a single '}'"),
        ("{}", "is not a field"),
        ("{ }", "is not a field"),
        ("{a!r}", "has a conversion or a format"),
        ("{a:>10}", "has a conversion or a format"),
        ("{a[0}", "is not a path"),
        ("{a..b}", "is not a path"),
    ],
)
def test_a_template_that_cannot_be_read_is_an_error(template: str, problem: str) -> None:
    with pytest.raises(ValueError, match="field|path|brace|format") as caught:
        parse_template(template)
    assert problem in str(caught.value)
