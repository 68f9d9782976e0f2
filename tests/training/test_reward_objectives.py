"""The margins of pairs, worked by hand; training by every objective is in tests/stages/test_reward_objectives.py."""

from __future__ import annotations

from align.training.reward_objectives import add_margins
from align.training.rows import Encoded


def test_margin_is_zero_for_pairs_without_two_scores() -> None:
    sources = [
        {"chosen_score": 3.0, "rejected_score": 1.0},
        {"chosen_score": 1.0, "rejected_score": 3.0},
        {"chosen_score": 3.0, "rejected_score": None},
        {},
    ]
    encoded = Encoded(rows=[{} for _ in sources], sources=sources)
    add_margins(encoded, 0.5, "reward")
    # 0.5 * (3 - 1), a negative difference, one score, and none
    assert [row["margin"] for row in encoded.rows] == [1.0, 0.0, 0.0, 0.0]
