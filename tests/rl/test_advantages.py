"""Generalized advantage estimation, worked by hand on three tokens."""

import pytest
import torch

from align.rl.advantages import explained_variance, gae
from align.rl.masking import response_mask, whiten

GAMMA, LAM = 0.9, 0.5


def test_gae_ends_at_eos_or_goes_on_from_the_state_reached():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.4, 0.2, 0.8]])
    mask = response_mask([3])
    # EOS:       d2 = 1 + 0 - 0.2 = 0.8        A2 = 0.8
    #            d1 = 0.9*0.2 - 0.4 = -0.22    A1 = -0.22 + 0.45*0.8 = 0.14
    #            d0 = 0.9*0.4 - 0.5 = -0.14    A0 = -0.14 + 0.45*0.14 = -0.077
    advantages, returns = gae(rewards, values, mask, torch.tensor([True]), gamma=GAMMA, lam=LAM, truncation="bootstrap")
    assert advantages[0].tolist() == pytest.approx([-0.077, 0.14, 0.8], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.423, 0.54, 1.0], abs=1e-6)
    # truncated: d2 = 1 + 0.9*0.8 - 0.2 = 1.52  A2 = 1.52
    #            A1 = -0.22 + 0.45*1.52 = 0.464  A0 = -0.14 + 0.45*0.464 = 0.0688
    cut = torch.tensor([False])
    advantages, _ = gae(rewards, values, mask, cut, gamma=GAMMA, lam=LAM, truncation="bootstrap")
    assert advantages[0].tolist() == pytest.approx([0.0688, 0.464, 1.52], abs=1e-6)
    advantages, _ = gae(rewards, values, mask, cut, gamma=GAMMA, lam=LAM, truncation="terminal")
    assert advantages[0].tolist() == pytest.approx([-0.077, 0.14, 0.8], abs=1e-6)


@pytest.mark.parametrize(
    ("finished", "truncation"),
    [(True, "bootstrap"), (True, "terminal"), (False, "terminal"), (False, "bootstrap")],
)
def test_gae_ignores_what_follows_a_row(finished, truncation):
    # The value of the state after the last token, 0.8, counts in the last case alone: nothing else may read it, or
    # what lies behind it.
    short = gae(
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[0.5, 0.4, 0.8]]),
        response_mask([2]),
        torch.tensor([finished]),
        gamma=GAMMA,
        lam=LAM,
        truncation=truncation,
    )
    padded = gae(
        torch.tensor([[0.0, 1.0, 50.0, float("nan")]]),
        torch.tensor([[0.5, 0.4, 0.8, float("nan"), 70.0]]),
        response_mask([2], 4),
        torch.tensor([finished]),
        gamma=GAMMA,
        lam=LAM,
        truncation=truncation,
    )
    # last token: 1 + 0.9 * (0.8 or 0) - 0.4
    after_end = 0.8 if (finished, truncation) == (False, "bootstrap") else 0.0
    assert padded[0][0, 1].item() == pytest.approx(1.0 + GAMMA * after_end - 0.4)
    for a, b in zip(short, padded, strict=True):
        assert torch.equal(a, b[:, :2])
        assert b[:, 2:].abs().sum() == 0


def test_lambda_one_is_the_return_minus_the_value():
    rewards = torch.tensor([[0.25, -1.0, 2.0]])
    values = torch.tensor([[0.5, 0.4, 0.2, 9.0]])
    advantages, returns = gae(
        rewards, values, response_mask([3]), torch.tensor([True]), gamma=1.0, lam=1.0, truncation="terminal"
    )
    # rewards to go: 1.25, 1, 2
    assert returns[0].tolist() == pytest.approx([1.25, 1.0, 2.0], abs=1e-6)
    assert advantages[0].tolist() == pytest.approx([0.75, 0.6, 1.8], abs=1e-6)


def test_whitened_advantages_have_mean_zero():
    mask = response_mask([2, 1], 3)
    whitened = whiten(torch.tensor([[1.0, 3.0, 77.0], [5.0, 77.0, 77.0]]), mask, shift_mean=True)
    assert whitened[mask].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449], abs=1e-6)


def test_explained_variance():
    mask = response_mask([3])
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    # residuals -1, 0, 1 have the returns' own variance
    assert explained_variance(torch.tensor([[2.0, 2.0, 2.0]]), returns, mask) == pytest.approx(0.0)
    # values in the wrong order: residuals -2, 0, 2: four times the variance
    assert explained_variance(torch.tensor([[3.0, 2.0, 1.0]]), returns, mask) == pytest.approx(-3.0)


def test_gae_skips_tokens_of_an_environment():
    # Two sampled tokens, two of a tool, one sampled token. V is 0.5, 0.4 before the first two, 0.2 before the last.
    mask = torch.tensor([[True, True, False, False, True]])
    rewards = torch.tensor([[0.0, 0.3, 0.0, 0.0, 1.0]])
    nan = float("nan")
    values = torch.tensor([[0.5, 0.4, nan, nan, 0.2, 0.8]])
    # d4 = 1 + 0 - 0.2 = 0.8              A4 = 0.8
    # d1 = 0.3 + 0.9*0.2 - 0.4 = 0.08     A1 = 0.08 + 0.45*0.8 = 0.44
    # d0 = 0.9*0.4 - 0.5 = -0.14          A0 = -0.14 + 0.45*0.44 = 0.058
    settings = {"gamma": GAMMA, "lam": LAM, "truncation": "terminal"}
    advantages, returns = gae(rewards, values, mask, torch.tensor([True]), **settings)
    assert advantages[0].tolist() == pytest.approx([0.058, 0.44, 0, 0, 0.8], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.558, 0.84, 0, 0, 1.0], abs=1e-6)
    # The same as in a row without the gap, bit for bit.
    own = mask[0].nonzero()[:, 0]
    short = gae(
        rewards[:, own], values[:, [0, 1, 4, 5]], torch.ones(1, 3, dtype=torch.bool), torch.tensor([True]), **settings
    )
    assert torch.equal(short[0], advantages[:, own]) and torch.equal(short[1], returns[:, own])
    # A discount of 0.5 between turns: d1 = 0.3 + 0.45*0.2 - 0.4 = -0.01, A1 = -0.01 + 0.225*0.8 = 0.17;
    # A0 = -0.14 + 0.45*0.17 = -0.0635. Nothing follows the last turn, so its own step keeps gamma.
    advantages, _ = gae(rewards, values, mask, torch.tensor([True]), turn_discount=0.5, **settings)
    assert advantages[0].tolist() == pytest.approx([-0.0635, 0.17, 0, 0, 0.8], abs=1e-6)
    # Truncated, bootstrapped from 0.8: d4 = 1 + 0.9*0.8 - 0.2 = 1.52, also with a discount between turns.
    settings["truncation"] = "bootstrap"
    advantages, _ = gae(rewards, values, mask, torch.tensor([False]), turn_discount=0.5, **settings)
    assert advantages[0, 4].item() == pytest.approx(1.52, abs=1e-6)


def test_turn_discount_applies_behind_forced_tokens():
    # A sampled token, a forced one that ends its turn, two of a tool, a sampled one: the next turn begins there.
    mask = torch.tensor([[True, False, False, False, True]])
    forced = torch.tensor([[False, True, False, False, False]])
    rewards = torch.tensor([[0.3, 0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.4, 9.0, 9.0, 9.0, 0.2, 0.8]])
    settings = {"gamma": GAMMA, "lam": LAM, "truncation": "terminal", "turn_discount": 0.5}
    # A4 = 1 - 0.2 = 0.8; d0 = 0.3 + 0.45*0.2 - 0.4 = -0.01, A0 = -0.01 + 0.225*0.8 = 0.17
    advantages, _ = gae(rewards, values, mask, torch.tensor([True]), forced=forced, **settings)
    assert advantages[0].tolist() == pytest.approx([0.17, 0, 0, 0, 0.8], abs=1e-6)
    # Only forced tokens between them: one turn. d0 = 0.3 + 0.9*0.2 - 0.4 = 0.08, A0 = 0.08 + 0.45*0.8 = 0.44
    advantages, _ = gae(rewards, values, mask, torch.tensor([True]), forced=~mask, **settings)
    assert advantages[0].tolist() == pytest.approx([0.44, 0, 0, 0, 0.8], abs=1e-6)
