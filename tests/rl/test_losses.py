"""PPO's losses, worked by hand on three tokens."""

import math

import pytest
import torch

from align.rl.losses import aggregate, importance_weights, loss_count, value_loss
from align.rl.masking import response_mask
from tests.support.rl.policy_losses import CLIP, make_tokens, policy_loss

MASK = response_mask([3])
OLD = torch.zeros(1, 3)
NEW = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.1)]])  # ratios 1.5, 0.5, 1.1


def surrogate(advantages, **options):
    return policy_loss(make_tokens(NEW, OLD, torch.tensor([advantages]), MASK), 3, **options)


def test_policy_loss_clips_only_what_helps():
    # A = 1: max(-1.5, -1.2) = -1.2;  max(-0.5, -0.8) = -0.5;  max(-1.1, -1.1) = -1.1;  sum -2.8
    assert surrogate([1.0, 1.0, 1.0]).loss.item() == pytest.approx(-2.8 / 3, abs=1e-6)
    # A = -1: max(1.5, 1.2) = 1.5;  max(0.5, 0.8) = 0.8;  1.1;  sum 3.4
    assert surrogate([-1.0, -1.0, -1.0]).loss.item() == pytest.approx(3.4 / 3, abs=1e-6)


def test_clip_fraction_ratio_and_approximate_kl():
    sums = surrogate([1.0, 1.0, 1.0]).sums
    assert sums["clipfrac"].item() == 1  # only the first token's clip binds
    assert sums["ratio"].item() == pytest.approx(3.1, abs=1e-6)
    expected = (math.log(1.5) ** 2 + math.log(0.5) ** 2 + math.log(1.1) ** 2) / 2
    assert sums["approx_kl"].item() == pytest.approx(expected, abs=1e-6)


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    new = torch.tensor([[math.log(8.0), 0.0, 0.0]])
    advantages = torch.tensor([[-1.0, 0.0, 1.0]])
    # max(8, 1.2) = 8, bounded by 3;  0;  -1
    tokens = make_tokens(new, OLD, advantages, MASK)
    bounded = policy_loss(tokens, 3, **CLIP, dual_clip=3.0)
    assert bounded.loss.item() == pytest.approx((3.0 - 1.0) / 3, abs=1e-6)
    plain = policy_loss(tokens, 3)
    assert plain.loss.item() == pytest.approx((8.0 - 1.0) / 3, abs=1e-5)


def test_gradient_raises_the_probability_of_good_tokens():
    new = torch.zeros(1, 3, requires_grad=True)
    policy_loss(make_tokens(new, OLD, torch.tensor([[1.0, -1.0, 0.0]]), MASK), 3).loss.backward()
    # d(-A rho)/d logp = -A at rho = 1
    assert new.grad[0].tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])


def test_importance_weights_are_truncated_and_carry_no_gradient():
    logprobs = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    sampler = torch.tensor([[math.log(0.25), math.log(2.0), float("nan")]])
    weights = importance_weights(logprobs, sampler, MASK, cap=2.0)
    # 1 / 0.25 = 4 -> 2;  1 / 2;  NaN -> 1
    assert weights[0].tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert not weights.requires_grad
    assert importance_weights(logprobs, sampler, MASK, cap=None).tolist() == [[1.0, 1.0, 1.0]]
    # A = 1: -1.2 * 2, -0.5 * 0.5, -1.1
    assert surrogate([1.0, 1.0, 1.0], weights=weights).loss.item() == pytest.approx(-(2.4 + 0.25 + 1.1) / 3, abs=1e-6)


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    old = torch.tensor([[0.0, 0.0, 0.0]])
    new = torch.tensor([[0.5, 0.1, -1.0]])
    returns = torch.tensor([[1.0, 1.0, 1.0]])
    # plain 0.25, 0.81, 4;  clipped values 0.2, 0.1, -0.2: 0.64, 0.81, 1.44;  worse 0.64, 0.81, 4;  half the sum 2.725
    terms = value_loss(new, old, returns, MASK, 3, value_clip_range=0.2)
    assert terms.loss.item() == pytest.approx(2.725 / 3, abs=1e-6)
    assert terms.sums["value_clipfrac"].item() == 1
    # without: (0.25 + 0.81 + 4) / 2 = 2.53
    assert value_loss(new, old, returns, MASK, 3, value_clip_range=None).loss.item() == pytest.approx(
        2.53 / 3, abs=1e-6
    )


def test_value_gradient_points_at_the_return():
    new = torch.zeros(1, 3, requires_grad=True)
    value_loss(new, OLD, torch.tensor([[1.0, -1.0, 0.0]]), MASK, 3, value_clip_range=None).loss.backward()
    assert new.grad[0].tolist() == pytest.approx([-1 / 3, 1 / 3, 0.0])


def test_aggregation_by_token_and_by_sequence():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, float("nan")]])
    mask = response_mask([3, 1], 3)
    # tokens: (1 + 2 + 3 + 4) / 4;  sequences: (2 + 4) / 2
    assert aggregate(values, mask, 4, "token").item() == 2.5
    assert aggregate(values, mask, 2, "sequence").item() == pytest.approx(3.0)


def test_micro_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    new, old, advantages = (torch.randn(4, 5) for _ in range(3))
    mask = response_mask([5, 2, 3, 1], 5)
    for kind, count in (("token", mask.sum()), ("sequence", 4)):
        full = policy_loss(make_tokens(new, old, advantages, mask), count, aggregation=kind).loss
        parts = [
            policy_loss(make_tokens(*(tensor[[i]] for tensor in (new, old, advantages, mask))), count, aggregation=kind)
            for i in range(4)
        ]
        assert torch.allclose(full, sum(part.loss for part in parts), atol=1e-6)


def test_responses_that_another_policy_wrote_are_dropped_whole():
    # ratios over all tokens: row 0 has 2 * 1/2 * 3 = 3, row 1 has 1.5; a cap of 2 allows [1/2, 2]
    logprobs = torch.tensor([[math.log(2.0), math.log(0.5), math.log(3.0)], [math.log(1.5), 0.0, 9.0]])
    mask = response_mask([3, 2])
    weights = importance_weights(logprobs, torch.zeros(2, 3), mask, cap=1.2, sequence_cap=2.0)
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert weights[1, :2].tolist() == pytest.approx([1.2, 1.0])
    remaining = importance_weights(logprobs, torch.zeros(2, 3), mask, cap=None, sequence_cap=3.1)
    assert remaining.tolist() == [[1.0] * 3] * 2


def test_constant_divisor_weighs_every_token_the_same():
    masks = [response_mask([3, 1], 4), response_mask([2], 4)]
    assert loss_count(masks, "token", 10) == 6
    assert loss_count(masks, "sequence", 10) == 3
    assert loss_count(masks, "constant", 10) == 30
    nothing = [torch.zeros(2, 4, dtype=torch.bool), response_mask([2], 4)]
    assert loss_count(nothing, "sequence", 10) == 1  # responses left out count nowhere
    # tokens 1 + 2 + 3 and 4: sum 10, over 2 responses x 10 tokens
    values = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 99.0, 99.0, 99.0]])
    assert aggregate(values, masks[0], loss_count(masks[:1], "constant", 10), "constant").item() == pytest.approx(0.5)


def test_ratios_of_policies_far_apart_stay_finite():
    """exp(20) at most, and exp(-20) at least: float32 would give infinity beyond 88 nats, and NaN times an advantage
    of 0."""
    new = torch.tensor([[500.0, -500.0, 500.0]])
    advantages = torch.tensor([[-1.0, 1.0, 0.0]])
    terms = policy_loss(make_tokens(new, OLD, advantages, MASK), 1)
    # max(e^20, 1.2) + max(-e^-20, -0.8) + 0
    assert terms.loss.item() == pytest.approx(math.exp(20), rel=1e-5)
    assert terms.sums["approx_kl"].item() == pytest.approx(3 * 20**2 / 2)
    weights = importance_weights(new, OLD, MASK, cap=1e12)
    assert weights[0].tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(20)], rel=1e-5)


def test_a_response_without_tokens_has_no_gradient():
    values = torch.ones(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    aggregate(values, mask, 1, "sequence").backward()
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_a_response_at_the_sequence_cap_is_kept():
    weights = importance_weights(torch.zeros(1, 3), torch.zeros(1, 3), MASK, cap=None, sequence_cap=1.0)
    assert weights.tolist() == [[1.0, 1.0, 1.0]]


def test_values_may_be_clipped_in_either_direction():
    old, returns = torch.zeros(1, 3), torch.tensor([[-1.0, 1.0, 0.0]])
    new = torch.tensor([[-0.5, 0.5, 0.0]])
    # clipped to -0.2 and 0.2: 0.64 each, worse than 0.25
    terms = value_loss(new, old, returns, MASK, 1, value_clip_range=0.2)
    assert terms.loss.item() == pytest.approx(0.64)
    assert terms.sums["value_clipfrac"].item() == 2
