"""Words are those of ``normalized``; runs of words hash alike wherever they stand, and nothing else does."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import ngrams
from align.data.ngrams import blocks, encode, read_sets, read_words
from align.data.rows import normalized

TEXT = st.text(st.sampled_from("aAbéÉßİ .,!?'\"’“\n\t\x1c\x85\u2028\u00a0①ﬁ+-/"), max_size=20)


def whole(*texts: str) -> list[int]:
    return [int(value) for value in read_words([encode(text) for text in texts]).hash_texts()]


def grams(text: str, size: int) -> list[int]:
    return [int(value) for value in read_words([encode(text)]).ngrams(size)[0]]


@settings(deadline=None)
@given(TEXT)
def test_words_are_those_of_normalized(text: str) -> None:
    read = read_words([encode(text)])
    expected = normalized(text).split()
    assert read.counts.tolist() == [len(expected)]
    assert whole(text) == whole(" ".join(expected))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_texts_hash_alike_only_when_their_words_are(left: str, right: str) -> None:
    first, second = whole(left, right)
    assert (first == second) == (normalized(left) == normalized(right))


def test_runs_of_words() -> None:
    # a b c | b c d | c d e: three runs of three words; "b c d" is the same run elsewhere, "d c b" is another
    runs = grams("a b c d e", 3)
    assert len(runs) == 3 == len(set(runs))
    assert grams("x, y, b c D!", 3)[-1] == runs[1]
    assert not set(grams("d c b", 3)) & set(runs)
    assert grams("ab c", 2) != grams("a bc", 2)


def test_a_short_text_is_one_run_and_a_text_without_words_none() -> None:
    read = read_words([encode(text) for text in ("one two", "...", "a b c d")])
    hashes, offsets = read.ngrams(3)
    assert offsets.tolist() == [0, 1, 1, 3]
    assert int(hashes[0]) == whole("one two")[0]
    assert read.hash_texts()[1] == 0


def test_scripts_without_spaces_are_read_by_character() -> None:
    assert read_words([encode("今天天气好"), encode("ดี มาก"), encode("안녕 하세요")]).counts.tolist() == [5, 5, 2]
    shared = set(grams("今天天气好", 2)) & set(grams("明天天气好", 2))
    assert len(shared) == 3  # 天天, 天气, 气好


@settings(deadline=None)
@given(st.lists(st.lists(TEXT, max_size=3), max_size=12), st.integers(1, 4), st.integers(1, 60))
def test_how_rows_are_blocked_changes_nothing(rows: list[list[str]], size: int, block_bytes: int) -> None:
    def all_grams() -> list[list[int]]:
        actual: list[list[int]] = []
        for block in blocks([(part, 0) for part in row] for row in rows):
            hashes, offsets = block.ngrams(size)
            assert block.first == len(actual)
            actual += [hashes[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        return actual

    at_once = all_grams()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "BLOCK_BYTES", block_bytes)
        assert all_grams() == at_once
    assert len(at_once) == len(rows)


def test_a_text_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "BLOCK_BYTES", 64)
    words = [f"w{number}" for number in range(5000)]
    assert grams(" ".join(words), 2)[-1] == grams("w4998 w4999", 2)[0]


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    words = "read_words([encode('The quick brown fox, née Ärger')])"
    code = f"from align.data.ngrams import *; print({words}.hash_texts()[0])"
    for seed in ("0", "1"):
        run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert int(run.stdout) == whole("the quick brown fox née ärger")[0] == FROZEN


FROZEN = 4545281233111560962
"""Builds of the same recipe must agree for ever; if this changes, so must the version of the ``data`` stage."""


def test_numbers_are_spread_one_to_one() -> None:
    values = np.arange(1 << 16, dtype=np.uint64)
    mixed = ngrams.mix(values)
    assert len(np.unique(mixed)) == len(values)
    assert abs(float((mixed >> np.uint64(63)).mean()) - 0.5) < 0.01


PART = st.tuples(st.lists(st.sampled_from("abcD"), max_size=7).map(" ".join), st.integers(0, 1))


def plain(row: list[tuple[str, int]], size: int) -> set[tuple[int, ...] | str]:
    result: set[tuple[int, ...] | str] = set()
    for text, mark in row:
        words = normalized(text).split()
        if words:
            result |= {(mark, *words[index : index + size]) for index in range(max(len(words) - size + 1, 1))}
    return result or {"no word"}


@settings(deadline=None)
@given(st.lists(st.lists(PART, max_size=3), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 40))
def test_as_with_sets(rows: list[list[tuple[str, int]]], size: int, elements: int) -> None:
    numbers = np.arange(len(rows)) * 3 + 5
    sets = read_sets(numbers, rows, size)
    left, right = np.repeat(numbers, len(rows)), np.tile(numbers, len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_ELEMENTS", elements)
        jaccard = sets.jaccard(left, right)
    mine = [plain(row, size) for row in rows]
    assert jaccard.tolist() == pytest.approx([len(a & b) / len(a | b) for a in mine for b in mine])


def test_no_pairs() -> None:
    sets = read_sets(np.array([4]), [[("a b c", 0)]], 2)
    assert sets.jaccard(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []
    assert sets.hashes.dtype == np.uint32 and sets.offsets.tolist() == [0, 2]
