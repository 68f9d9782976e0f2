"""Metrics worked by hand."""

import pytest
import torch

from align.rl.metrics import Averages, correlation


def test_correlation_of_scores_and_lengths():
    # deviations -1, 0, 1 and -2, 1, 1: covariance sum 3, squares 2 and 6
    actual = correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 3]))
    assert actual == pytest.approx(3 / 12**0.5)
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([1, 2])) == 0.0


def test_an_average_over_nothing_is_zero():
    averages = Averages()
    averages.add("ratio", torch.tensor(0.0), torch.tensor(0))
    averages.add("score", torch.tensor(6.0), torch.tensor(3))
    assert averages.means(lambda totals: totals) == {"ratio": 0.0, "score": 2.0}
