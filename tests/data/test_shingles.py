"""Exact similarities of sets of shingles against Python's own sets, however the pairs are cut up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import shingles
from align.data.rows import normalized
from align.data.shingles import read_sets

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
        patch.setattr(shingles, "_ELEMENTS", elements)
        jaccard = sets.jaccard(left, right)
    mine = [plain(row, size) for row in rows]
    assert jaccard.tolist() == pytest.approx([len(a & b) / len(a | b) for a in mine for b in mine])


def test_no_pairs() -> None:
    sets = read_sets(np.array([4]), [[("a b c", 0)]], 2)
    assert sets.jaccard(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []
    assert sets.hashes.dtype == np.uint32 and sets.offsets.tolist() == [0, 2]
