"""Masked reductions, worked by hand."""

import pytest
import torch

from align.rl.masking import (
    last_index,
    masked_mean_var,
    masked_sum,
    pad_rows,
    response_mask,
    turn_ends,
    value_mask,
    whiten,
)

VALUES = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 99.0]])
MASK = response_mask([2, 1], 3)


def test_response_mask_is_true_on_real_tokens():
    assert MASK.tolist() == [[True, True, False], [True, False, False]]
    assert last_index(MASK).tolist() == [1, 0]


def test_masks_of_episodes_have_gaps():
    # Two sampled tokens, one of a tool, one sampled; and a single sampled token.
    mask = pad_rows([[True, True, False, True], [True]], 5, torch.bool)
    assert mask.tolist() == [[True, True, False, True, False], [True, False, False, False, False]]
    assert last_index(mask).tolist() == [3, 0]
    # States with a value: before tokens 0, 1 and 3, and the end, 4. The one before the tool's token has none.
    assert value_mask(mask).tolist() == [
        [True, True, False, True, True, False],
        [True, True, False, False, False, False],
    ]
    assert turn_ends(mask).tolist() == [[False, True, False, True, False], [True, False, False, False, False]]


def test_response_without_gaps_has_values_at_every_state():
    assert value_mask(MASK).tolist() == [[True, True, True, False], [True, True, False, False]]


def test_nothing_leaks_from_the_padding():
    # 1 + 3 + 5 = 9, over 3 tokens 3; variance (4 + 0 + 4) / 3
    assert masked_sum(VALUES, MASK).item() == 9.0
    mean, variance = masked_mean_var(VALUES, MASK)
    assert mean.item() == 3.0
    assert variance.item() == pytest.approx(8 / 3)


def test_whitening_moves_the_mean_only_when_asked():
    shifted = whiten(VALUES, MASK, shift_mean=True)
    # (1 - 3, 3 - 3, 5 - 3) / sqrt(8 / 3) = -1.2247, 0, 1.2247
    assert shifted[MASK].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449], abs=1e-6)
    whitened = whiten(VALUES, MASK, shift_mean=False)
    assert whitened[MASK].tolist() == pytest.approx([3 - 1.2247449, 3.0, 3 + 1.2247449], abs=1e-6)
    assert shifted[~MASK].abs().sum() == 0


def test_pad_rows():
    assert pad_rows([[1.0], [2.0, 3.0]], 3).tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]


def test_values_that_are_all_the_same_whiten_to_their_mean():
    same = torch.full((2, 3), 7.0)
    assert whiten(same, MASK, shift_mean=True).tolist() == [[0.0] * 3] * 2
    assert whiten(same, MASK, shift_mean=False)[MASK].tolist() == [7.0] * 3


def test_whitening_leaves_a_small_spread_at_variance_one():
    """What keeps it from dividing by 0 is small against variances of 1e-4."""
    values = torch.tensor([[-0.01, 0.01]])
    assert whiten(values, response_mask([2]), shift_mean=True)[0].tolist() == pytest.approx([-1.0, 1.0], abs=1e-3)


def test_padding_may_be_wider_than_the_longest_row():
    assert response_mask([1, 2], 4).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert pad_rows([[1], [2, 3]], 2, torch.long).dtype == torch.long
