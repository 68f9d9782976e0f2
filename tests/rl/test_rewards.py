"""Scores and rewards, worked by hand on three tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.rl.masking import response_mask, whiten
from align.rl.rewards import RunningScale, adjust_scores, shape_rewards

MASK = response_mask([3, 2], 3)
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 7.0]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -3.0, -7.0]])


def test_tokens_pay_for_drift_and_the_last_earns_the_score():
    rewards, kl = shape_rewards(torch.tensor([1.0, -2.0]), LOGPROBS, REFERENCE, MASK, kl_coef=0.1)
    # row 0: kl 0.5, -1, 0        -> -0.05, +0.1, 0 + 1
    # row 1: kl 0, 2 (pad ignored) -> 0, -0.2 - 2
    assert kl.tolist() == [[0.5, -1.0, 0.0], [0.0, 2.0, 0.0]]
    expected = torch.tensor([[-0.05, 0.1, 1.0], [0.0, -2.2, 0.0]])
    assert torch.allclose(rewards, expected)


def test_missing_eos_is_subtracted_after_clipping():
    scores = torch.tensor([5.0, -5.0, 0.5])
    adjusted = adjust_scores(scores, torch.tensor([True, False, False]), missing_eos_penalty=1.0, score_clip=2.0)
    # 2; -2 - 1; 0.5 - 1
    assert adjusted.tolist() == [2.0, -3.0, -0.5]
    assert scores.tolist() == [5.0, -5.0, 0.5]


def test_scores_pass_unchanged_by_default():
    scores = torch.tensor([5.0, -5.0])
    assert adjust_scores(scores, torch.tensor([False, True])).tolist() == [5.0, -5.0]


def test_reward_whitening_keeps_the_mean():
    rewards = torch.tensor([[1.0, 3.0, 5.0], [7.0, 9.0, 1e9]])
    whitened = whiten(rewards, MASK, shift_mean=False)
    # mean 5, variance (16 + 4 + 0 + 4 + 16) / 5 = 8
    assert whitened[MASK].mean().item() == pytest.approx(5.0, abs=1e-5)
    assert whitened[0, 0].item() == pytest.approx(5 - 4 / 8**0.5, abs=1e-5)


def test_every_token_of_a_response_can_cost_something():
    adjusted = adjust_scores(
        torch.tensor([5.0, 1.0]),
        torch.tensor([True, False]),
        missing_eos_penalty=1.0,
        score_clip=2.0,
        length_penalty=0.1,
        lengths=torch.tensor([3, 10]),
    )
    # 2 - 0.3;  1 - 1 - 1
    assert adjusted.tolist() == pytest.approx([1.7, -1.0])


# ---- the running scale ----


def test_the_scale_has_mean_and_deviation_of_all_scores_so_far():
    scale = RunningScale()
    scale.add(torch.tensor([1.0, 3.0]))
    # mean 2, variance 1
    assert scale.apply(torch.tensor([4.0])).tolist() == [2.0]
    scale.add(torch.tensor([5.0, 7.0]))
    # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert scale.std == pytest.approx(5**0.5)
    assert scale.apply(torch.tensor([4.0, 9.0])).tolist() == pytest.approx([0.0, 5**0.5])


def test_scores_that_are_all_the_same_become_zero():
    scale = RunningScale()
    scale.add(torch.tensor([3.0, 3.0]))
    assert scale.apply(torch.tensor([3.0, 4.0])).tolist() == [0.0, 1.0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_batches_count_as_one(batches):
    scale = RunningScale()
    for batch in batches:
        scale.add(torch.tensor(batch, dtype=torch.float64))
    every = torch.tensor([score for batch in batches for score in batch], dtype=torch.float64)
    assert scale.mean == pytest.approx(every.mean().item(), abs=1e-9)
    assert scale.std == pytest.approx(every.std(correction=0).item(), abs=1e-6)


def test_the_scale_goes_on_from_its_state():
    first, second = RunningScale(), RunningScale()
    first.add(torch.tensor([1.0, 2.0, 4.0]))
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        scale.add(torch.tensor([8.0]))
    assert first.state_dict() == second.state_dict()


def test_scores_before_any_came_pass_unchanged():
    scale = RunningScale()
    assert scale.std == 0.0
    assert scale.apply(torch.tensor([3.0, -2.0])).tolist() == [3.0, -2.0]
