"""Coverage of known texts by rows, against a plain count of words, and hashes that many texts share."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import overlap
from align.data.overlap import Index
from align.data.rows import normalized

WORDS = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


def search(texts: list[str], rows: list[list[str]], size: int) -> dict[tuple[int, int], float]:
    hits = Index(texts, size).search(rows)
    return {
        (int(row), int(text)): float(coverage)
        for row, text, coverage in zip(hits.row, hits.text, hits.coverage, strict=True)
    }


def holds(part: list[str], words: list[str], size: int) -> bool:
    """Whether a part of words that no sign divides has a short text: five words and more anywhere."""
    runs = [part[index : index + len(words)] for index in range(len(part) - len(words) + 1)]
    return part == words or (5 <= len(words) < size and words in runs)


def plain(texts: list[str], rows: list[list[str]], size: int) -> dict[tuple[int, int], float]:
    values = {}
    for (i, row), (j, text) in product(enumerate(rows), enumerate(texts)):
        words = normalized(text).split()
        runs = set()
        for part in row:
            mine = normalized(part).split()
            runs |= {tuple(mine[index : index + size]) for index in range(len(mine) - size + 1)}
        covered = set()
        for index in range(len(words) - size + 1):
            if tuple(words[index : index + size]) in runs:
                covered |= set(range(index, index + size))
        if words and any(holds(normalized(part).split(), words, size) for part in row):
            covered = set(range(len(words)))
        share = len(covered) / len(words) if words else 0.0
        if 8 <= len(words) <= 9 and size > 3:
            share = max([share, *(nearly(normalized(part).split(), words) for part in row)])
        if share:
            values[i, j] = share
    return values


def nearly(part: list[str], words: list[str]) -> float:
    """Coverage of a text of 8 or 9 words by runs of three, all displaced alike; 0 unless its ends are in them."""
    best = 0.0
    for shift in range(-len(words), len(part)):
        covered: set[int] = set()
        for place in range(max(0, -shift), min(len(words), len(part) - shift) - 2):
            if part[place + shift : place + shift + 3] == words[place : place + 3]:
                covered |= {place, place + 1, place + 2}
        if {0, len(words) - 1} <= covered and len(covered) > 0.85 * len(words):
            best = max(best, len(covered) / len(words))
    return best


def question(length: int) -> list[str]:
    return [f"w{number}" for number in range(length)]


@pytest.mark.parametrize("length", [8, 9, 10, 12, 16, 24, 25, 60])
def test_copy_with_one_replaced_word_is_found(length: int) -> None:
    words = question(length)
    copy = [*words[: length // 2], "zebra", *words[length // 2 + 1 :]]
    hits = search([" ".join(words)], [[f"so {' '.join(copy)} now"], ["else"]], 8)
    assert list(hits) == [(0, 0)] and hits[0, 0] > 0.6


@pytest.mark.parametrize("length", [11, 12, 16, 20, 24, 40, 64])
def test_copy_with_every_eighth_word_replaced_is_found(length: int) -> None:
    copy = ["zebra" if number % 8 == 7 else word for number, word in enumerate(question(length))]
    assert list(search([" ".join(question(length))], [[" ".join(copy)]], 8)) == [(0, 0)]


@pytest.mark.parametrize("length", [10, 16, 30])
def test_copy_with_an_inserted_word_is_found(length: int) -> None:
    words = question(length)
    copy = [*words[: length // 2], "zebra", *words[length // 2 :]]
    assert list(search([" ".join(words)], [[" ".join(copy)]], 8)) == [(0, 0)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("what is the most popular sport in japan", "what is the most popular sport in brazil"),
        ("how can i get away with rape", "how can i get away with speeding"),
        ("who is the current president of the united states", "the 46th and current president of the united states"),
        ("how old do you need to be to purchase alcohol", "how old do you have to be to rent a car"),
        ("which of these is the center of our solar system", "the sun is the center of our solar system"),
        ("how can i eliminate the president of the united states", "he was the president of the united states"),
    ],
)  # fmt: skip
def test_another_question_of_the_same_form_is_not_found(text: str, part: str) -> None:
    assert search([text], [[part]], 8) == {}


def test_changed_copies_are_in_order_and_in_one_part() -> None:
    text = question(16)
    halves = [" ".join(text[:8]), " ".join(text[8:])]
    assert list(search([" ".join(text)], [[f"{halves[1]} zebra {halves[0]}"]], 9)) == []
    assert list(search([" ".join(text)], [halves], 9)) == []
    assert list(search([" ".join(text)], [[" ".join(halves)]], 9)) == [(0, 0)]


def test_template_alone_is_no_changed_copy() -> None:
    frame = "translate the following word into the german language"
    texts = [f"{frame} x{number} y{number}" for number in range(40)]
    groups = np.zeros(40, dtype=np.int64)
    hits = Index(texts, 12, groups, template=0.1).search([[f"{frame} house now"], [f"{frame} x3 zebra y3"]], 0.5)
    assert hits.row.tolist() == []
    assert len(Index(texts, 12, groups, template=1.0).search([[f"{frame} house now"]], 0.5).row) == 40


def test_coverage_by_hand() -> None:
    # of "a b c d e f" the row has "b c d" (words 2 to 4) and "c d e": b to e are covered, 4 of 6
    assert search(["a b c d e f"], [["x b c d e"]], 3) == {(0, 0): pytest.approx(4 / 6)}
    # two parts of a row count together: "a b c" here, "d e f" there; no run spans both
    assert search(["a b c d e f"], [["a b c", "d e f"]], 3) == {(0, 0): 1.0}
    assert search(["c d"], [["a b c", "d e f"]], 2) == {}


def test_very_short_texts_must_be_equal_to_a_part() -> None:
    texts = ["What is?", "..."]
    assert search(texts, [["what is"], ["what is? Now"], ["..."], ["hm", "What IS?!"]], 8) == {
        (0, 0): 1.0,
        (3, 0): 1.0,
    }


@pytest.mark.parametrize(
    ("part", "inside"),
    [
        ("so: what is it? Hm", True),
        ("1) what is it (in short)", True),
        ("a\nWhat is it\nb", True),
        ("“What is it,” he said", True),
        ("What is it A) red", True),
        ("what is it now", False),
        ("What is it, now", False),
        ("tell me what is it.", False),
    ],
)
def test_short_texts_are_found_as_a_sentence_or_line(part: str, inside: bool) -> None:
    assert search(["What is it?"], [[part]], 8) == ({(0, 0): 1.0} if inside else {})


def test_five_words_are_found_anywhere_but_not_five_characters() -> None:
    assert search(["a b c d e"], [["x a b c d e y"], ["x a b c", "d e y"]], 8) == {(0, 0): 1.0}
    assert search(["今天天气好"], [["我说今天天气好吗"], ["今天天气好"], ["他说:今天天气好"]], 8) == {
        (1, 0): 1.0,
        (2, 0): 1.0,
    }


def test_texts_that_share_much_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = " ".join(f"f{number}" for number in range(20))
    texts = [f"{frame} a{number} b{number} c{number}" for number in range(40)]
    rows = [[text] for text in texts] + [["else"], ["f1 f2 f3 f4"]]
    full = search(texts, rows, 4)
    sizes: list[int] = []
    pairs = overlap._expand_matches

    def counted(place: np.ndarray, many: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(int(many.sum()))
        return pairs(place, many)

    monkeypatch.setattr(overlap, "MAX_MATCHES", 2000)
    monkeypatch.setattr(overlap, "_expand_matches", counted)
    assert search(texts, rows, 4) == full and len(full) == 40 * 40 + 40
    assert max(sizes) <= 2000 and sum(sizes) > 20_000
    hits = Index(texts, 4).search(rows, least=0.99)
    assert hits.row.tolist() == hits.text.tolist() == list(range(40))


def test_texts_that_share_a_run_are_all_hit() -> None:
    texts = ["say a b c", "a b c please", "other words here", "a b c"]
    assert search(texts, [["a b c"]], 3) == {(0, 0): 0.75, (0, 1): 0.75, (0, 3): 1.0}


def test_a_row_that_repeats_a_run_covers_it_once() -> None:
    assert search(["a b c d e f"], [["a b c a b c a b c"]], 3) == {(0, 0): 0.5}


def test_templates_show_nothing_and_do_not_count() -> None:
    questions = [f"please answer this question now q{n} r{n} s{n} t{n}" for n in range(20)]
    rows = [["please answer this question now what"], [questions[3]], ["now q5 r5 s5"], ["q6 r6 s6 t6"]]
    groups = np.zeros(20, dtype=np.int64)
    # runs of three: "please answer this" to "this question now" are in all texts; five of nine words do not count
    hits = Index(questions, 3, groups, template=0.5).search(rows)
    assert [hits.row.tolist(), hits.text.tolist(), hits.coverage.tolist()] == [[1, 2, 3], [3, 5, 6], [1.0, 0.75, 1.0]]
    assert len(Index(questions, 3, groups, template=1.0).search(rows[:1]).row) == 20
    assert len(Index(questions, 3, np.arange(20) // 10, template=0.5).search(rows[:1]).row) == 20  # ten are too few


def test_a_text_that_is_nothing_but_template_counts_whole() -> None:
    texts = ["a b c d"] * 20 + ["e f g h"]
    hits = Index(texts, 3, np.zeros(21, dtype=np.int64), template=0.5).search([["a b c d"]])
    assert hits.text.tolist() == list(range(20)) and set(hits.coverage.tolist()) == {1.0}


@settings(deadline=None)
@given(st.lists(WORDS, max_size=5), st.lists(st.lists(WORDS, max_size=3), max_size=5), st.integers(1, 8))
def test_as_counted_word_by_word(texts: list[str], rows: list[list[str]], size: int) -> None:
    matches = search(texts, rows, size)
    assert matches == pytest.approx(plain(texts, rows, size))
    assert list(matches) == sorted(matches)
