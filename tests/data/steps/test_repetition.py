"""Repetition: loops are found, what repeats by nature is not; the shares are worked out by hand."""

import random
import time

import pytest

from align.config.recipe.filter_settings import Repetition
from align.data.steps.repetition import find_repetition, prose
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run

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


def test_hostile_texts_take_no_time():
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
