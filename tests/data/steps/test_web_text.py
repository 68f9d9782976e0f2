"""Filters by addresses, stock phrases and repetition."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.filter_settings import Boilerplate, FilterStep, Repetition
from align.data.rows import Dropped, assistant, user
from align.data.steps.step import step_identities
from align.data.steps.web_text import find_repetition, find_url, has_url, prose, rules, strip_urls
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


def test_url_in_assistant_turn_of_prompt_is_ignored():
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


def test_addresses_of_hostile_texts_are_found_fast():
    texts = ["https://a.b " + piece * 30_000 for piece in ("![", "[a](", "www.", "https://", "(", "[", " ")]
    start = time.process_time()
    for text in texts:
        strip_urls(text)
    assert time.process_time() - start < 5


RULES = {rule.name: rule for rule in rules()}
INNOCENT = [text for rule in rules() for text in rule.passes]


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_its_examples(name):
    rule = RULES[name]
    assert len(rule.finds) >= 3 and len(rule.passes) >= 2
    for text in rule.finds:
        for spelled in (text, text.upper(), text.replace("'", "’")):
            assert rule.search(spelled, spelled.lower()), spelled


@pytest.mark.parametrize("name", RULES)
def test_no_rule_finds_an_innocent_text(name):
    rule = RULES[name]
    for text in INNOCENT:
        assert not rule.search(text, text.lower()), text


@pytest.mark.parametrize("name", RULES)
def test_words_that_rules_need_do_not_hide_anything(name):
    rule = RULES[name]
    assert all(word == word.lower() for word in rule.needs)
    if rule.position == "start":
        assert not rule.needs
    else:  # a refusal in the middle of a text is found, one at its start by ``match`` is not
        assert rule.search("So it is. " + rule.finds[0], ("So it is. " + rule.finds[0]).lower())


def test_a_refusal_counts_at_the_start_only():
    assert reason(instruction(answer="I'm sorry, but I can't help with that."), boilerplate={}) == "filter: refusal"
    assert reason(instruction(answer='"Oh, I’m sorry, I cannot assist you."'), boilerplate={}) == "filter: refusal"
    story = "Anna put down the phone. She had asked twice.\n\n" + "x" * 300 + " I'm sorry, but I can't help with that."
    assert reason(instruction(answer=story), boilerplate={}) is None


def test_kinds_are_chosen():
    text = "As an AI language model, I was trained by OpenAI."
    assert reason(instruction(answer=text), boilerplate={}) == "filter: self_reference"
    assert reason(instruction(answer=text), boilerplate={"kinds": ["developer"]}) == "filter: developer"
    assert reason(instruction(answer=text), boilerplate={"kinds": ["refusal"]}) is None


def test_what_was_found_is_told():
    (result,) = run([instruction(answer="Well. " * 30 + "As an AI, I cannot eat. More.")], boilerplate={})
    assert result.detail["rule"] == "as an AI"
    assert result.detail["in"] == "completion"
    assert "As an AI, I" in result.detail["excerpt"]
    assert len(result.detail["excerpt"]) < 200


def test_a_refusal_that_was_rejected_drops_nothing():
    refusal, answer = "I'm sorry, but I can't help with that.", "Boil the water first."
    assert reason(pair(answer, refusal), boilerplate={}) is None
    assert reason(pair(answer, refusal), boilerplate={}, sides="both") == "filter: refusal"
    assert reason(pair(refusal, answer), boilerplate={}) == "filter: refusal"
    assert reason(instruction(answer=refusal, label=False), boilerplate={}) is None
    assert reason(instruction(answer=refusal, label=True), boilerplate={}) == "filter: refusal"


@pytest.mark.parametrize(
    ("responses", "dropped"),
    [
        ([("ok", None, 1), ("I can't help with that.", None, 0)], True),
        ([("ok", None, 0), ("I can't help with that.", None, 1)], False),
        ([("ok", 1.0, None), ("I can't help with that.", 2.0, None)], True),
        ([("ok", 2.0, None), ("I can't help with that.", 1.0, None)], False),
        ([("ok", None, None), ("I can't help with that.", None, None)], False),
    ],
)
def test_of_several_responses_the_best_counts(responses, dropped):
    row = instruction(responses=[{"content": c, "score": s, "rank": r} for c, s, r in responses])
    del row["completion"]
    assert (reason(row, boilerplate={}) is not None) == dropped
    assert reason(row, boilerplate={}, sides="both") == "filter: refusal"


def test_earlier_turns_do_not_count():
    refusal = assistant("I'm sorry, but I can't help with that.")
    row = instruction()
    assert reason(row | {"prompt": [*row["prompt"], refusal, *row["prompt"]]}, boilerplate={}) is None


def test_patterns_of_ones_own(refused):
    row = instruction(answer="Visit ACME today.")
    assert reason(row, boilerplate={"patterns": [r"\bacme\b"]}) == "filter: pattern"
    assert reason(row, boilerplate={}) is None
    refused(Boilerplate, patterns=["("])


def test_the_key_holds_the_rules(monkeypatch):
    step = FilterStep(type="filter", boilerplate={})
    before = step_identities(step, Path())
    monkeypatch.setattr("align.data.steps.web_text._rules_text", lambda: "{}")
    assert step_identities(step, Path()) != before


def test_stock_phrases_of_hostile_texts_are_found_fast():
    texts = ["sorry " * 20_000, "as an ai " * 20_000, "i am an " * 20_000 + "language model", "I " * 60_000]
    start = time.process_time()
    run([instruction(answer=text) for text in texts], boilerplate={})
    assert time.process_time() - start < 5


def test_dolly_was_written_by_people_and_harmless_replies_refuse(shared_data: Path):
    people = json.loads((shared_data / "dolly-3k" / "dolly_3k.json").read_text(encoding="utf-8"))
    assert not [r for r in people if r["output"] and reason(instruction(answer=r["output"]), boilerplate={})]
    with gzip.open(shared_data / "hh-rlhf" / "harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        chosen = [json.loads(line)["chosen"].rpartition("\n\nAssistant:")[2].strip() for line in file]
    actual = [text for text in chosen if reason(instruction(answer=text), boilerplate={}) is not None]
    assert 40 <= len(actual) <= 60  # 49 when this was written, each of them read


WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "nu", "pe", "ri")
    for b in ("ba", "do", "fi", "gu", "he", "ja", "ko", "la", "mo")
]
"""54 different words of four letters."""
TEXT = " ".join(WORDS)


def found(text: str, **settings):
    result = find_repetition(text, Repetition(**settings))
    return result and (result[0], round(result[1], 3), result[3])


def test_a_text_without_repetition():
    assert found(TEXT, scale=0.01) is None


def test_lines_and_paragraphs():
    # Of 10 lines 6 stood there before: 0.6 is the limit at scale 2, and 7 of 11 is over it.
    lines = [" ".join(WORDS[i : i + 14]) for i in (0, 14, 28, 40)]
    assert found("\n".join(lines + lines[:1] * 6), scale=2, consecutive_sentences=None)[0] != "lines"
    assert found("\n".join(lines + lines[:1] * 7), scale=2, consecutive_sentences=None) == ("lines", 0.636, lines[0])
    assert found("\n\n".join(lines + lines[:1] * 7), consecutive_sentences=None) == ("paragraphs", 0.636, lines[0])


def test_a_long_line_counts_by_its_length():
    long, short = " ".join(WORDS[:30]), [f"{word}." for word in WORDS[30:]]
    # 24 short lines of 5 letters (120), and the line of 149 letters twice: 149 of 418 characters stood there before
    text = "\n".join([long, *short, long])
    assert found(text, scale=1.77) == ("lines by length", 0.356, long)
    assert found(text, scale=1.79)[0] != "lines by length"


def test_the_commonest_ngram():
    # "kaba kado" opens the text and stands there four more times: 5 occurrences of 9 characters
    text = " ".join([TEXT, *[f"kaba kado {word}" for word in ("a", "b", "c", "d")]])
    length = len(text)
    assert found(text, scale=0.5) == ("top 2-gram", round(5 * 9 / length, 3), "kaba kado")
    assert found(text, scale=1) is None


def test_duplicate_ngrams_count_from_the_second_time_and_once():
    text = f"{TEXT} {' '.join(WORDS[:20])}"
    # 20 words stand there again: four 5-grams of 24 characters (five words of four letters and the spaces in them)
    assert found(text, scale=1) == ("5-grams", round(4 * 24 / len(text), 3), " ".join(WORDS[:5]))
    assert found(text, scale=3) is None


def test_short_texts_have_no_shares():
    text = "to be or not to be, " * 3 + "that is it"
    assert found(text) is None
    assert found(text, min_words=10) is not None


def test_sentences_in_a_row_and_anywhere():
    def times(count: int, between: str = "") -> str:
        return f" {between}".join(["I will go home."] * count)

    assert found(times(3)) is None
    assert found(times(4)) == ("consecutive sentences", 4, "I will go home.")
    assert found(times(4), consecutive_sentences=None) is None
    others = [f"And then the {word} came. I will go home." for word in WORDS]
    assert found(" ".join(others[:9]), min_words=1000) is None
    assert found(" ".join(others[:10]), min_words=1000) == ("same sentence", 10, "I will go home.")


def test_sentences_with_figures_may_repeat_twice_as_often():
    assert found("So we add 5 apples. " * 7, min_words=1000) is None
    assert found("So we add 5 apples. " * 8, min_words=1000) == ("consecutive sentences", 8, "So we add 5 apples.")


@pytest.mark.parametrize(
    "line",
    [
        "    return value",
        "x += 1;",
        "print(value)",
        "import os",
        "| a | b |",
        "----------",
        "12 + 12 = 24",
        "</div>",
        "} else {",
    ],
)
def test_code_tables_and_sums_may_repeat(line):
    text = f"{TEXT}\n" + f"{line}\n" * 60
    assert found(text) is None
    assert prose(text) == f"{TEXT}\n"


def test_fenced_code_may_repeat_and_prose_around_it_may_not():
    code = "```\nsome words that stand in code\n" + "again and again the same line of it\n" * 40 + "```\n"
    assert found(f"{TEXT}\n{code}") is None
    assert found(f"{TEXT}\n{code}" + "again and again the same line of it\n" * 40) is not None


def test_loops_are_found_in_text_that_has_none():
    rng = random.Random(3)
    missed = 0
    for _ in range(200):
        words = rng.choices(WORDS, k=rng.randint(40, 120))
        index, size = rng.randrange(30), rng.randint(3, 8)
        missed += found(" ".join(words + words[index : index + size] * rng.randint(12, 20))) is None
        assert found(" ".join(words)) is None
    assert missed <= 6


def test_step_and_sides():
    loop = "The answer is the same again. " * 12
    (result,) = run([instruction(answer=loop)], repetition={})
    assert result.reason == "filter: repetition of consecutive sentences"
    assert result.detail == {"found": 12, "limit": 4, "in": "completion", "excerpt": "The answer is the same again."}
    assert reason(instruction(question=loop), repetition={}) is None
    assert reason(pair("Short.", loop), repetition={}) is None
    assert reason(pair("Short.", loop), repetition={}, sides="both") == result.reason


def test_repetition_of_hostile_texts_is_found_fast():
    texts = [
        "a" * 200_000,
        "a b " * 50_000,
        ";" * 100_000,
        "; " * 50_000 + "x",
        "```\n" * 30_000,
        "(" * 100_000,
        ". " * 50_000,
    ]
    start = time.process_time()
    run([instruction(answer=f"{text}\n{text[:20]}") for text in texts], repetition={})
    assert time.process_time() - start < 5
