"""Held-out scores of reward models that predict numbers: error, correlation, and whether the better one is above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from align.models.steps import Aggregate, combined
from align.training.held_out import pair_accuracy, scoring
from align.training.order import by_length
from align.training.reward_trainer import number_loss, scores_at
from align.training.rows import Encoded
from align.training.trainers import SCORING_TOKENS


def predictions(trainer: Any, encoded: Encoded) -> list[list[float]]:
    """The score at every place of every row."""
    found: list[list[float]] = [[] for _ in encoded.rows]
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS):
            inputs = trainer._prepare_inputs(trainer.data_collator([encoded.rows[at] for at in batch]))
            scores = iter(scores_at(trainer.model, inputs)[0].tolist())
            for at in batch:
                found[at] = [next(scores) for _ in encoded.rows[at]["places"]]
    return found


def numbers(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Of regression: ``loss``, ``pearson``, ``spearman``, and ``accuracy`` over ``disjoint_pairs``."""
    scores = [row[0] for row in predictions(trainer, encoded)]
    targets = [float(row["targets"][0]) for row in encoded.rows]
    better, worse = disjoint_pairs(scores, targets)
    return {
        "loss": _loss(trainer, scores, targets),
        "pearson": correlation(scores, targets),
        "spearman": correlation(ranks(scores), ranks(targets)),
        "accuracy": pair_accuracy(better, worse) if better else 0.5,
    }


def steps(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Of process rewards: ``loss``; ``step_accuracy`` at even odds; ``accuracy``, right steps above wrong ones, over
    disjoint pairs; and ``answer_accuracy_<aggregate>``, answers without a wrong step above those with one.
    """
    rows = predictions(trainer, encoded)
    scores = [score for row in rows for score in row]
    targets = [float(target) for row in encoded.rows for target in row["targets"]]
    better, worse = disjoint_pairs(scores, [float(target >= 0.5) for target in targets])
    right = sum((score > 0) == (target >= 0.5) for score, target in zip(scores, targets, strict=True))
    found = {
        "loss": _loss(trainer, scores, targets),
        "step_accuracy": right / len(scores),
        "accuracy": pair_accuracy(better, worse) if better else 0.5,
    }
    sound = [float(min(row["targets"]) >= 0.5) for row in encoded.rows]
    for how in get_args(Aggregate):
        better, worse = disjoint_pairs([combined(row, how) for row in rows], sound)
        if better:
            found[f"answer_accuracy_{how}"] = pair_accuracy(better, worse)
    return found


def disjoint_pairs(scores: Sequence[float], targets: Sequence[float]) -> tuple[list[float], list[float]]:
    """Scores of better and of worse ones, each row in one pair at most, so that pairs are independent.

    Rows are sorted by target and the lower half is paired with the upper one; pairs of equal targets are left out.
    """
    order = sorted(range(len(scores)), key=lambda at: (targets[at], at))
    half = len(order) // 2
    upper = order[len(order) - half :]
    pairs = [(high, low) for low, high in zip(order[:half], upper, strict=True) if targets[high] > targets[low]]
    return [scores[high] for high, _ in pairs], [scores[low] for _, low in pairs]


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; 0 where either does not vary."""
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equal values sharing their mean one."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for at in order[start:end]:
            found[at] = (start + end - 1) / 2
        start = end
    return found


def _loss(trainer: Any, scores: Sequence[float], targets: Sequence[float]) -> float:
    return float(number_loss(torch.tensor(scores), torch.tensor(targets), trainer.score_loss, 0.0))
