"""Weights of attention in bfloat16: by the faster of two kernels, and as good by either."""

from __future__ import annotations

import pytest
import torch

from align.models.fast import attention as short_attention


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [(1, torch.float32), (32, torch.bfloat16), (56, torch.float32), (64, torch.bfloat16), (100, torch.bfloat16),
     (112, torch.float32), (250, torch.bfloat16)],
)  # fmt: skip
def test_a_softmax_in_bfloat16_rounds_once(keys, dtype):
    generator = torch.Generator().manual_seed(keys)
    scores = torch.randn(2, 3, 9, keys, generator=generator).bfloat16() * 4
    scores[..., keys // 2 + 1 :] = float("-inf")
    weights = short_attention._softmax(scores)
    assert weights.dtype == dtype
    exact = torch.softmax(scores.double(), dim=-1)
    # To the nearest number of 8 significant bits, with room for what float32 loses before.
    assert ((weights.bfloat16() - exact).abs() <= exact * 2**-8 * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_of_wider_scores_stays_as_wide(dtype):
    assert short_attention._softmax(torch.randn(1, 1, 2, 40, dtype=dtype)).dtype == dtype
