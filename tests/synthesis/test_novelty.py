"""ROUGE-L against a pool: sums worked by hand, and every text's nearest found as by comparing with each."""

from __future__ import annotations

import random

import numpy as np
import pytest

from align.synthesis.novelty import Nearest, Pool, rouge_words


def _pool(*texts: str) -> Pool:
    pool = Pool()
    for text in texts:
        pool.add(text)
    return pool


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        # the longest common subsequence is "police the gunman" without "kill(ed)": 3 of 4 and 4 words
        ("police killed the gunman", "police kill the gunman", 2 * 3 / (4 + 4)),
        # "the gunman" or "police", whichever: 2 of 4 and 4 words
        ("police killed the gunman", "the gunman kill police", 2 * 2 / (4 + 4)),
        # order counts, places do not: "a c e" of 5 and 3 words
        ("a b c d e", "a c e", 2 * 3 / (5 + 3)),
        # capitals and signs do not count; "write a poem about the sea" whole, in 6 and 8 words
        ("Write a poem about the sea.", "write, a POEM about the deep blue sea!", 2 * 6 / (6 + 8)),
        # repeated words count as often as both have them: "a a" of 3 and 2 words
        ("a a a", "a a", 2 * 2 / (3 + 2)),
        ("same words", "same words", 1.0),
    ],
)
def test_rouge_l_by_hand(left: str, right: str, expected: float) -> None:
    for first, second in ((left, right), (right, left)):
        nearest = _pool(first).nearest(second)
        assert nearest is not None
        assert nearest.similarity == pytest.approx(expected, abs=1e-12)
        assert nearest.text == first


def test_nothing_in_common_or_nothing_there() -> None:
    assert Pool().nearest("anything") is None
    assert _pool("one two").nearest("three four") is None
    assert _pool("!?").nearest("...") is None
    assert len(_pool("a", "b", "!?")) == 3


def test_words() -> None:
    assert rouge_words("It's 3.5% of self_made") == ["it", "s", "3", "5", "of", "self", "made"]
    assert rouge_words("ÄPFEL und crème") == ["äpfel", "und", "crème"]
    assert rouge_words("写一首诗 about 海") == ["写", "一", "首", "诗", "about", "海"]


def _longest_common(first: list[str], others: list[list[str]]) -> np.ndarray:
    """The textbook table, for each of the others at once: a row of it is (others, words + 1)."""
    width = max(map(len, others))
    words = np.array([text + [""] * (width - len(text)) for text in others])
    row = np.zeros((len(others), width + 1), dtype=int)
    for word in first:
        row[:, 1:] = np.maximum(row[:, 1:], row[:, :-1] + (words == word))
        row = np.maximum.accumulate(row, axis=1)
    return row[:, -1]


def test_the_nearest_of_many_is_found() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 90))) for _ in range(300)]
    others = texts[:250]
    pool = _pool(*others)
    lengths = np.array([len(text.split()) for text in others])
    for text in texts[250:]:
        words = text.split()
        similarities = 2 * _longest_common(words, [other.split() for other in others]) / (len(words) + lengths)
        nearest = pool.nearest(text)
        assert nearest is not None
        assert nearest.similarity == pytest.approx(similarities.max())
        assert similarities[others.index(nearest.text)] == pytest.approx(nearest.similarity)


def test_more_words_than_one_byte_holds() -> None:
    pool = _pool(*(f"word{number} and" for number in range(70_000)))
    assert pool.nearest("word69999 and") == Nearest(1.0, "word69999 and")
    assert pool.nearest("word69999 or") == Nearest(0.5, "word69999 and")
