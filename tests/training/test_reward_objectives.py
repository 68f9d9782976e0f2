"""Margins and targets, worked by hand; training by every objective is in tests/stages/test_reward_objectives.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import UserError
from align.models.built_in import make_tiny_tokenizer
from align.store.artifacts import Kind
from align.training.reward_objectives import add_margins, prepare
from align.training.rows import Encoded
from tests.support.stages.stage_contexts import reward_stage
from tests.support.training.scored_rows import artifact, scored


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


def targets(scores: list[float], score_loss: str, folder: Path) -> list[float]:
    """Return the targets of training answers with these scores; the test split has valid scores."""
    train = [{**row, "score": score} for row, score in zip(scored(len(scores)), scores, strict=True)]
    test = [{**row, "score": 0.5} for row in scored(2, start=len(scores))]
    data = artifact(folder / "data", Kind.INSTRUCTIONS, train, test)
    stage = reward_stage(folder, folder, data, objective="regression", score_loss=score_loss)
    objective = prepare(stage, make_tiny_tokenizer())
    return [float(row["targets"][0]) for row in objective.splits["train"].rows]


def test_targets_of_bce_are_scores_from_0_to_1(tmp_path: Path) -> None:
    assert targets([0.0, 0.25, 1.0], "bce", tmp_path) == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("score", [-0.01, 1.01, 1.5, 2.0])
def test_bce_refuses_scores_outside_0_to_1(score: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"1 of 3 train answers have others, such as {score:g}\. Set `score_loss"):
        targets([0.0, score, 1.0], "bce", tmp_path)


def test_targets_of_mse_are_standardized(tmp_path: Path) -> None:
    # The mean of 1, 2 and 6 is 3, the variance (4 + 1 + 9) / 3.
    deviation = (14 / 3) ** 0.5
    assert targets([1.0, 2.0, 6.0], "mse", tmp_path) == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation])
