"""Advantages without a critic, worked by hand and held against trl's own numbers."""

from __future__ import annotations

import pytest
import torch

from align.rl.advantages import (
    EPSILON,
    fill_failed,
    group_advantages,
    leave_one_out,
    overlong_penalty,
    whiten_responses,
    without_variance,
)

SCORES = torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0, 6.0])
GROUPS = torch.tensor([7, 7, 7, 2, 2, 2])


def test_a_group_s_mean_is_the_baseline():
    # group 7: mean 2, deviations -1 1 0, sample std 1; group 2: mean 2, deviations -2 -2 4, sample std sqrt(12)
    assert group_advantages(SCORES, GROUPS, "none").tolist() == [-1.0, 1.0, 0.0, -2.0, -2.0, 4.0]
    spread = 12**0.5 + EPSILON
    expected = [-1 / (1 + EPSILON), 1 / (1 + EPSILON), 0.0, -2 / spread, -2 / spread, 4 / spread]
    assert group_advantages(SCORES, GROUPS, "group").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_spreads_are_trl_s(scale):
    from trl.trainer.utils import nanstd

    rows = SCORES.view(2, 3)
    spread = nanstd(rows, dim=1).repeat_interleave(3) if scale == "group" else nanstd(SCORES)
    expected = (SCORES - rows.mean(dim=1).repeat_interleave(3)) / (spread + 1e-4)
    assert torch.allclose(group_advantages(SCORES, GROUPS, scale), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("score", [37.3, -12.7, 250.3])
def test_equal_scores_have_no_advantage_despite_rounding(scale, score):
    # the float32 mean of 16 scores of 37.3 is 4e-6 off, which EPSILON would turn into 0.037
    scores = torch.full((16,), score)
    both = torch.cat([scores, SCORES])
    groups = torch.cat([torch.zeros(16, dtype=torch.long), GROUPS])
    assert group_advantages(scores, groups[:16], scale).tolist() == [0.0] * 16
    assert group_advantages(both, groups, scale)[:16].tolist() == [0.0] * 16
    if scale != "batch":
        assert torch.equal(group_advantages(both, groups, scale)[16:], group_advantages(SCORES, GROUPS, scale))


def test_the_others_mean_is_rloo_s_baseline():
    # 1 - (3+2)/2, 3 - (1+2)/2, 2 - (1+3)/2; 0 - 3, 0 - 3, 6 - 0
    assert leave_one_out(SCORES, GROUPS).tolist() == [-1.5, 1.5, 0.0, -3.0, -3.0, 6.0]


def test_whitened_advantages_have_mean_0_and_sample_variance_1():
    responses = whiten_responses(SCORES)
    assert responses.mean().item() == pytest.approx(0, abs=1e-6)
    assert responses.std().item() == pytest.approx(1, abs=1e-3)


def test_groups_need_not_stand_together():
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    for scale in ("group", "none"):
        actual = group_advantages(SCORES[order], GROUPS[order], scale)
        assert torch.allclose(actual, group_advantages(SCORES, GROUPS, scale)[order])


def test_the_last_tokens_cost_more_and_more():
    # max 10, buffer 4: free up to 6, then a quarter of the penalty for each token
    lengths = torch.tensor([3, 6, 7, 8, 10])
    assert overlong_penalty(lengths, 10, 4, 2.0).tolist() == [0.0, 0.0, 0.5, 1.0, 2.0]
    assert overlong_penalty(lengths, 10, 0, 2.0).tolist() == [0.0] * 5


def test_groups_with_one_score_are_found():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert without_variance(scores, groups).tolist() == [True, True, False, False, True, True]


def test_failed_response_has_the_mean_of_its_group():
    values = torch.tensor([1.0, torch.nan, 4.0, -9.0, 2.0])
    failed = torch.tensor([False, True, False, True, False])
    groups = torch.tensor([7, 7, 7, 3, 5])
    filled = fill_failed(values, failed, groups)
    assert filled.tolist() == [1.0, 2.5, 4.0, 0.0, 2.0]  # (1 + 4) / 2; a group of failures has 0
    assert leave_one_out(filled, groups)[1] == 0.0
    assert group_advantages(filled, groups, "none").tolist() == [-1.5, 0.0, 1.5, 0.0, 0.0]
