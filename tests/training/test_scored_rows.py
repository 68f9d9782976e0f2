"""Scores of single answers as targets of a reward model."""

from __future__ import annotations

import pytest

from align.errors import UserError
from align.training.reward_objectives import Scale, scale_of


@pytest.mark.parametrize(("score", "count"), [(2.0, 4), (0.1, 10), (0.7, 7), (4.3, 25)])
def test_equal_scores_are_refused_though_their_mean_is_rounded(score: float, count: int) -> None:
    # the float64 mean of seven scores of 0.7 is 1e-16 off, and so would be their standard deviation
    with pytest.raises(UserError, match=f"all {count} training answers have the score {score:g}: nothing to learn"):
        scale_of([{"target": score}] * count, "reward")


def test_targets_are_standardized_over_those_that_have_one() -> None:
    # mean 3, deviations -2 0 2: variance 8 / 3
    scale = scale_of([{"target": 1.0}, {"target": None}, {"target": 3.0}, {"target": 5.0}], "reward")
    assert scale == Scale(3.0, (8 / 3) ** 0.5)
    assert scale(3.0) == 0.0


def test_default_scale_keeps_targets() -> None:
    # Shares and log-odds (score_loss: bce) are trained on as they are.
    assert [Scale()(target) for target in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
