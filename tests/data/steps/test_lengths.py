"""Lengths: bounds are inclusive, every reply counts, and tokens are those of the named tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from align.config.recipe.filter_settings import FilterStep, Tokens
from align.data.rows import Dropped, assistant, user
from align.data.steps.filter import tokenizer_identities, tokens_filter
from align.data.steps.step import start_step, step_identities
from tests.support.data.steps.rows_for_steps import CONTEXT, instruction, pair, reason, run
from tests.support.data.steps.tables import context
from tests.support.refusals import Refused

PAIR = pair("1234567", "123", "12345")
"""A prompt of 5 characters, replies of 7 and 3."""


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"max": 12}, None),
        ({"max": 11}, "chars.max"),
        ({"min": 12}, None),
        ({"min": 13}, "chars.min"),
        ({"max_prompt": 5, "max_reply": 7, "min_prompt": 5, "min_reply": 3}, None),
        ({"max_prompt": 4}, "chars.max_prompt"),
        ({"min_prompt": 6}, "chars.min_prompt"),
        ({"max_reply": 6}, "chars.max_reply"),
        ({"min_reply": 4}, "chars.min_reply"),
    ],
)
@pytest.mark.parametrize("sides", ["chosen", "both"])
def test_bounds_on_characters(bounds, expected, sides):
    assert reason(PAIR, chars=bounds, sides=sides) == (expected and f"filter: {expected}")


def test_a_long_rejected_reply_counts_too():
    assert reason(pair("a", "a" * 50), chars={"max_reply": 49}) == "filter: chars.max_reply"


def test_all_turns_of_a_prompt_count():
    row = instruction() | {"prompt": [{"role": "system", "content": "12"}, user("34"), assistant("5"), user("6")]}
    assert reason(row, chars={"max_prompt": 6}) is None
    assert reason(row, chars={"max_prompt": 5}) == "filter: chars.max_prompt"


def test_a_prompt_alone_has_no_reply_to_measure():
    row = instruction("12345")
    del row["completion"]
    assert reason(row, chars={"min_reply": 9}) is None
    assert reason(row, chars={"max": 4}) == "filter: chars.max"


def test_words_and_the_detail():
    (result,) = run([instruction("one two", "three  four\nfive")], words={"max": 4})
    assert result == Dropped("filter: words.max", {"found": 5, "limit": 4})


def test_turns():
    row = instruction() | {"prompt": [user("a"), assistant("b"), user("c")]}
    assert reason(row, turns={"min": 3, "max": 3}) is None
    assert reason(row, turns={"max": 2}) == "filter: turns.max"
    assert reason(row, turns={"min": 4}) == "filter: turns.min"


def test_several_replies():
    row = instruction(
        responses=[{"content": "12", "score": None, "rank": 0}, {"content": "12345", "score": None, "rank": 1}]
    )
    del row["completion"]
    assert reason(row, chars={"max_reply": 4}) == "filter: chars.max_reply"
    assert reason(row, chars={"min_reply": 3}) == "filter: chars.min_reply"


def test_tokens_are_the_tokenizers(tiny_model: Path):
    # the tiny model's tokens are bytes
    settings = {"tokenizer": str(tiny_model)}
    row = instruction("é€", "abc")
    assert reason(row, tokens=settings | {"max": 8, "max_prompt": 5, "max_reply": 3}) is None
    assert reason(row, tokens=settings | {"max_prompt": 4}) == "filter: tokens.max_prompt"
    rows = [instruction("a", "b" * size) for size in (3, 9, 4, 8)]
    results = run(rows, tokens=settings | {"max_reply": 5})
    assert [isinstance(result, Dropped) for result in results] == [False, True, False, True]
    assert results[1] == Dropped("filter: tokens.max_reply", {"found": 9, "limit": 5})


def test_the_key_holds_the_tokenizers_files(tiny_model: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_model, tmp_path / "tokenizer")
    step = FilterStep(type="filter", tokens={"tokenizer": "tokenizer", "max": 5})
    before = step_identities(step, tmp_path)
    assert before["tokenizer tokenizer.json"].startswith("sha256:")
    (copy / "model.safetensors").write_bytes(b"other")
    assert step_identities(step, tmp_path) == before
    (copy / "tokenizer.json").write_text("{}")
    assert step_identities(step, tmp_path) != before


def test_tokenizers_that_are_not_there(refused: Refused, tmp_path: Path):
    missing = Tokens(tokenizer="none/here", max=5)
    refused(tokenizer_identities, missing, tmp_path)
    refused(lambda: tokens_filter(missing, context(base=tmp_path)))
    pinned = Tokens(tokenizer="owner/name", revision="a" * 40, max=5)
    assert tokenizer_identities(pinned, tmp_path) == {"tokenizer": "owner/name@" + "a" * 40}
    (tmp_path / "empty").mkdir()
    refused(lambda: tokenizer_identities(Tokens(tokenizer="empty", max=5), tmp_path))
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    refused(lambda: tokens_filter(Tokens(tokenizer="empty", max=5), context(base=tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chars": {}}, "no bound is given; set one of min, max, min_prompt"),
        ({"turns": {}}, "no bound is given; set one of min, max"),
        ({"words": {"min_reply": 5, "max_reply": 4}}, r"min_reply \(5\) is more than max_reply \(4\)"),
        ({"tokens": {"max": 5}}, "tokenizer"),
        ({"tokens": {"max": 5, "tokenizer": "x", "revision": "main"}}, "revision"),
    ],
)
def test_wrong_bounds(settings, message):
    with pytest.raises(ValidationError, match=message):
        start_step(FilterStep(type="filter", **settings), CONTEXT)


def test_fields_that_are_null_have_no_length():
    # as read from a Parquet file that also holds rows of another form
    row = instruction("12", "345", chosen=None, rejected=None, responses=None)
    assert reason(row, chars={"max": 5, "min_reply": 3}) is None


@pytest.mark.parametrize(
    "text", ["I am {{name}}.", "By {{ author.name }}", "Name five companies < noinput >", "<NoInput>"]
)
def test_placeholders(text):
    for row in (instruction(answer=text), instruction(question=text), pair("yes", text)):
        assert reason(row, placeholders=True) == "filter: placeholder"
    assert reason(instruction(answer=text), placeholders=False, turns={"max": 1}) is None


@pytest.mark.parametrize(
    "text",
    [
        "Sincerely,\n[Your Name]",
        "In Jinja write `{{ name }}` for it.",
        "```\n<p>{{ name }}</p>\n```",
        "url: https://ghcr.io/${{ github.repository }}",
        "The set {{1, 2}, {3}} and {x}",
        "$\\frac{{1}}{{2}}$",
        "There was no input",
    ],
)
def test_no_placeholders(text):
    assert reason(instruction(answer=text), placeholders=True) is None


def test_what_was_found_is_told():
    (result,) = run([instruction(answer="`x` Hello, {{ first name }}!")], placeholders=True)
    assert result == Dropped("filter: placeholder", {"in": "completion", "excerpt": "{{ first name }}"})


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Draw a cat", "draw"),
        ("Look at this IMAGE.", "image"),
        ("Please go  to the shop", "go to"),
        ("Plot, then stop", "plot"),
        ("Imagine a mapping of profiles", None),
        ("Drawing is fun", None),
    ],
)
def test_self_instructs_words(question, word):
    assert reason(instruction(question), keywords="self_instruct") == (word and f"filter: keyword {word}")


def test_words_of_ones_own():
    assert reason(instruction("What about C++ code?"), keywords=["c++"]) == "filter: keyword c++"
    assert reason(instruction("What about C++11?"), keywords=["c++"]) is None
    assert reason(instruction("Über Äpfel"), keywords=["äpfel"]) == "filter: keyword äpfel"
    assert reason(instruction("go to"), keywords=["go", "go to"]) == "filter: keyword go to"


def test_users_turns_only():
    row = instruction("Hi", "Draw it") | {"prompt": [user("a"), assistant("draw"), user("b")]}
    assert reason(row, keywords=["draw"]) is None
    assert reason(row | {"prompt": [user("draw"), assistant("a"), user("b")]}, keywords=["draw"]) is not None


def test_empty_words(refused):
    refused(FilterStep, type="filter", keywords=["a", " "])
