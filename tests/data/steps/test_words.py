"""Placeholders that nobody filled in, and words in the user's turns."""

import pytest
from pydantic import ValidationError

from align.config.recipe.filter_settings import FilterStep
from align.data.rows import Dropped, assistant, user
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run


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


def test_empty_words():
    with pytest.raises(ValidationError, match="keywords holds an empty word"):
        FilterStep(type="filter", keywords=["a", " "])
