"""Measures of held-out rows that need no model."""

from __future__ import annotations

from align.training.held_out import mislabeled
from align.training.rows import Encoded


def test_pairs_with_two_different_scores_tell_the_better_side() -> None:
    sources = [
        {"chosen_score": 3.0, "rejected_score": 1.0},
        {"chosen_score": 1.0, "rejected_score": 3.0},
        {"chosen_score": 2.0, "rejected_score": 2.0},
        {"chosen_score": 2.0, "rejected_score": None},
        {"chosen_score": None, "rejected_score": 2.0},
        {},
    ]
    assert mislabeled(Encoded(sources=sources)) == {0: False, 1: True}
