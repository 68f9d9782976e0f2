"""The search for like embeddings against a plain double loop in whole numbers, and at the very threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import embedding_search
from align.data.embedding_search import SCALE, find_similar, quantize


def plain(vectors: np.ndarray, threshold: float) -> list[int]:
    label = list(range(len(vectors)))
    for row in range(len(vectors)):
        for column in range(row):
            product = int(vectors[row].astype(np.int64) @ vectors[column].astype(np.int64))
            if label[column] == column and product >= threshold * SCALE * SCALE:
                label[row] = column
                break
    return label


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.3, 0.7, 0.95, 1.0]))
def test_as_in_a_plain_double_loop(seed: int, block: int, chunk: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, 3))
    vectors[rng.integers(40, size=10)] = vectors[rng.integers(40, size=10)]
    stored = quantize(vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_search, "BLOCK", block)
        patch.setattr(embedding_search, "CHUNK", chunk)
        assert find_similar(stored, threshold).label.tolist() == plain(stored, threshold)


def test_a_dropped_row_is_like_the_row_that_stands_for_it_though_a_chain_leads_farther() -> None:
    angles = np.radians([0, 20, 40, 60])
    stored = quantize(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    # 20 degrees are like (0.94), 40 are not (0.77): the third is like the second alone, which does not stay
    assert find_similar(stored, 0.9).label.tolist() == [0, 0, 2, 2]


def test_embeddings_are_stored_at_length_one_and_nothing_is_like_nothing() -> None:
    stored = quantize(np.array([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [0.0, 0.0]], dtype=np.float32))
    assert stored.tolist() == [[19660, 26214], [0, 0], [19660, 26214], [0, 0]]
    assert find_similar(stored, 0.01).label.tolist() == [0, 1, 0, 3]


def test_the_threshold_is_decided_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = quantize(np.random.default_rng(0).normal(size=(2, 64)))
    product = int(stored[0].astype(np.int64) @ stored[1].astype(np.int64))
    index = product / SCALE / SCALE
    stored[1] *= 1 if index > 0 else -1
    index, above = abs(index), np.nextafter(abs(index), 2)
    true_matmul = torch.Tensor.__matmul__
    for wrong in (-5e-5, 0.0, 5e-5):  # another order of summation, another processor
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b, wrong=wrong: true_matmul(a, b) + wrong)
        assert find_similar(stored, index).label.tolist() == [0, 0]
        assert find_similar(stored, above + 1e-12).label.tolist() == [0, 1]


def test_rows_that_went_are_compared_with_no_more() -> None:
    stored = quantize(np.ones((3000, 4)))
    similar = find_similar(stored, 0.9)
    assert (similar.label == 0).all()
    assert similar.compared == 2048 * 2047 // 2 + (3000 - 2048)
