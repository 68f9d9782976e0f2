"""Addresses: found, taken out with the text around them in order, and never half."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.rows import Dropped, assistant, user
from align.data.steps.links import find_url, has_url, strip_urls
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run


@pytest.mark.parametrize(
    "text",
    [
        "See https://a.org/b?c=d#e",
        "HTTP://A.ORG",
        "(ftp://a.b/c)",
        "at www.tauday.com.",
        "WWW.tauday.com",
        "Www.tauday.com",
    ],
)
def test_addresses(text):
    assert find_url(text)
    assert has_url(text)


@pytest.mark.parametrize(
    "text", ["a.org", "www. is short", "http:// is a scheme", "std::vector", "www.", "awww.cute.kitten"]
)
def test_no_addresses(text):
    assert not find_url(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See https://a.org/b.", "See."),
        ("See https://a.org/b for more", "See for more"),
        ("https://a.org/b", ""),
        ("(see https://a.org/b)", "(see)"),
        ("A film: https://en.wikipedia.org/wiki/Up_(film). Good!", "A film:. Good!"),
        ("Read [the manual](https://a.org/b_(c)) first.", "Read the manual first."),
        ('Read [it](https://a.org/b "A title") now', "Read it now"),
        ("![a cat](https://a.org/cat.png) A cat", " A cat"),
        ("<https://a.org> is it", " is it"),
        ("1. https://a.org\n2. www.b.org\n", "1.\n2.\n"),
        ("f(x) = y  ; no address , here", "f(x) = y  ; no address , here"),
        ("keep  this , and https://a.org that", "keep  this , and that"),
    ],
)
def test_taking_out(text, expected):
    assert strip_urls(text) == expected


def test_steps():
    linked = instruction(answer="See https://a.org/b for more.")
    (result,) = run([linked], urls="drop")
    assert result == Dropped("filter: url", {"in": "completion", "excerpt": "See https://a.org/b for more."})
    (result,) = run([linked], urls="strip")
    assert result == linked | {"completion": [assistant("See for more.")]}
    assert reason(instruction(), urls="drop") is None
    assert reason(instruction(), urls="strip") is None
    assert reason(instruction("What is on https://a.org?"), urls="drop") == "filter: url"
    (result,) = run([instruction("https://a.org", "It is a page.")], urls="strip")
    assert result == Dropped("filter: nothing but a url", {"in": "prompt"})


def test_sides():
    row = pair("Yes.", "No, see www.a.org")
    assert reason(row, urls="drop") is None
    assert reason(row, urls="drop", sides="both") == "filter: url"
    (result,) = run([row], urls="strip")
    assert result["rejected"] == [assistant("No, see")]
    only = pair("Yes.", "www.a.org")
    assert reason(only, urls="strip") == "filter: nothing but a url"


def test_an_address_in_an_assistants_turn_of_the_prompt_is_no_reason():
    row = instruction() | {"prompt": [user("a"), assistant("www.a.org"), user("b")]}
    assert reason(row, urls="drop") is None


PIECES = st.sampled_from(
    [
        "https://",
        "www.",
        "a.org",
        "/b",
        "(",
        ")",
        "[",
        "]",
        "](",
        "!",
        "<",
        ">",
        '"',
        " ",
        "\n",
        ".",
        ",",
        "word",
        "é",
        "`",
    ]
)


@settings(deadline=None, max_examples=500, derandomize=True)
@given(st.lists(PIECES, max_size=20).map("".join))
def test_nothing_is_left_and_nothing_else_is_lost(text):
    left = strip_urls(text)
    assert not find_url(left) or find_url(text)
    letters = iter(text)
    assert all(char in letters for char in left)  # what is left stood there, in that order
    if not find_url(text):
        assert left == text


def test_hostile_texts_take_no_time():
    texts = ["https://a.b " + piece * 30_000 for piece in ("![", "[a](", "www.", "https://", "(", "[", " ")]
    start = time.process_time()
    for text in texts:
        strip_urls(text)
    assert time.process_time() - start < 5
