"""Clusters from pairs, against a plain walk."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.duplicates import first_equal, first_stays, join


@settings(deadline=None)
@given(st.integers(1, 15), st.data())
def test_components_carry_the_label_of_their_first_row(count: int, data: st.DataObject) -> None:
    node = st.integers(0, count - 1)
    batches = data.draw(st.lists(st.lists(st.tuples(node, node), max_size=8), max_size=3))
    expected = list(range(count))
    for left, right in [pair for batch in batches for pair in batch]:
        first, second = sorted((expected[left], expected[right]))
        expected = [first if label == second else label for label in expected]
    label = np.arange(count)
    for batch in batches:
        pairs = np.array(batch, dtype=np.int64).reshape(-1, 2)
        join(label, pairs[:, 0], pairs[:, 1])
        assert (label[label] == label).all()
    assert label.tolist() == expected


def test_the_first_of_equal_keys() -> None:
    assert first_equal(np.array([3.5, 1.0, 3.5, 2.0, 1.0])).tolist() == [0, 1, 0, 3, 1]
    assert first_equal(np.array([[2, 1], [1, 2], [2, 1]]).view("i8,i8")[:, 0]).tolist() == [0, 1, 0]
    assert first_equal(np.zeros(0)).tolist() == []


def test_others_than_the_first_are_dropped_by_their_number_in_the_table() -> None:
    code, instead = first_stays(6, np.array([1, 2, 4, 5]), np.array([0, 1, 0, 1]))
    assert code.tolist() == [-1, -1, -1, -1, 0, 0] and code.dtype == np.int32
    assert instead.tolist() == [-1, -1, -1, -1, 1, 2] and instead.dtype == np.int64
