"""Drawing tokens: the right distribution, edges included."""

from __future__ import annotations

import pytest
import torch

from align.inference.protocol import Sampling
from align.inference.transformers import BLOCK, pick_tokens, processed_logprobs


def test_inverse_cdf_by_hand() -> None:
    # cumulative sums 0.2, 0.7, 0.7, 1.0: a draw picks the first one above it; token 2 has no probability
    logprobs = torch.tensor([0.2, 0.5, 0.0, 0.3]).log().repeat(6, 1)
    uniform = torch.tensor([0.0, 0.199, 0.2001, 0.699, 0.7001, 0.999999])
    assert pick_tokens(logprobs, uniform).tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("width", [3, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_frequencies_follow_probabilities_across_blocks(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(1, width, generator=generator).mul(2).log_softmax(-1)
    draws = 100_000
    # An even grid of uniforms instead of random ones: each count is then within 1 of draws x probability, so the
    # largest error is that of one grid point (and float32 sums).
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = torch.bincount(pick_tokens(logprobs.expand(draws, -1), uniform), minlength=width)
    assert (counts - draws * logprobs[0].exp()).abs().max() < 2


def test_zero_probability_is_never_drawn_at_the_edges() -> None:
    logprobs = torch.full((2, 2 * BLOCK), float("-inf"))
    logprobs[:, 5] = logprobs[:, BLOCK + 1] = torch.log(torch.tensor(0.5))
    assert pick_tokens(logprobs, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [5, BLOCK + 1]


def test_temperature_and_top_p_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert torch.allclose(processed_logprobs(logits, 1.0, 1.0).exp(), torch.tensor([[0.5, 0.3, 0.2]]))
    # halving the temperature squares: 0.25, 0.09, 0.04 over 0.38
    assert torch.allclose(processed_logprobs(logits, 0.5, 1.0).exp(), torch.tensor([[0.25, 0.09, 0.04]]) / 0.38)
    # 0.5 alone falls short of 0.6, so the second token stays: 0.5 and 0.3 over 0.8
    assert torch.allclose(processed_logprobs(logits, 1.0, 0.6).exp(), torch.tensor([[0.625, 0.375, 0.0]]))
    assert torch.allclose(processed_logprobs(logits, 1.0, 0.5).exp(), torch.tensor([[1.0, 0.0, 0.0]]))


def test_request_seeds_differ_and_fit_torch() -> None:
    seeds = {Sampling(8, seed=s).request_seed(i, j) for s in range(3) for i in range(20) for j in range(4)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_of_their_own_make_a_prompts_place_not_matter() -> None:
    together, alone = Sampling(8, seed=1, seeds=(5, 6)), Sampling(8, seed=2, seeds=(6,))
    assert together.request_seed(1, 3) == alone.request_seed(0, 3)
    assert len({together.request_seed(place, sample) for place in (0, 1) for sample in range(4)}) == 8
