"""Scores of several reward models and functions, worked by hand."""

import pytest

from align.rl.scoring import Ensemble, Part, WeightedSum, combine
from tests.support.rl.trainers import Fixed


def test_combinations_by_hand():
    assert combine([1.0, 2.0, 6.0], "mean", 1.0) == 3.0
    assert combine([1.0, 2.0, 6.0], "minimum", 1.0) == 1.0
    # variance (4 + 1 + 9) / 3
    assert combine([1.0, 2.0, 6.0], "uncertainty", 0.5) == pytest.approx(3.0 - 0.5 * 14 / 3)


def test_an_ensemble_scores_each_response_and_tells_how_far_its_members_are_apart():
    parts = Ensemble((Fixed(1.0, 4.0), Fixed(3.0, 4.0)), "minimum").score_parts([{}, {}], ["a", "b"])
    assert parts == {"": [1.0, 4.0], "spread": [1.0, 0.0]}


def test_a_sum_weighs_its_parts_and_names_them():
    ensemble = Ensemble((Fixed(1.0, 4.0), Fixed(3.0, 4.0)), "mean")
    both = WeightedSum((Part("reward", 2.0, ensemble), Part("function", 0.5, Fixed(4.0, 0.0))))
    parts = both.score_parts([{}, {}], ["a", "b"])
    assert parts == {
        "": [6.0, 8.0],  # 2 * 2 + 0.5 * 4;  2 * 4
        "reward": [2.0, 4.0],
        "reward_spread": [1.0, 0.0],
        "function": [4.0, 0.0],
    }
    assert both.score([{}, {}], ["a", "b"]) == [6.0, 8.0]


def test_a_single_part_is_not_repeated():
    assert WeightedSum((Part("reward", 2.0, Fixed(1.5)),)).score_parts([{}], ["a"]) == {"": [3.0]}
