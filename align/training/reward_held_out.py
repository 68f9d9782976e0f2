"""Held-out scores of reward models that predict numbers: error, correlation and accuracy on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from accelerate.utils import send_to_device

from align.models.reward import Aggregate, combine_steps
from align.training.held_out import pair_accuracy, scoring
from align.training.order import by_length
from align.training.reward_trainer import number_loss, scores_at
from align.training.rows import Encoded
from align.training.trainers import SCORING_TOKENS


def predictions(trainer: Any, encoded: Encoded) -> list[list[float]]:
    """Return the score at every place of every row."""
    scores_of_rows: list[list[float]] = [[] for _ in encoded.rows]
    with scoring(trainer):
        for batch in by_length(encoded.lengths, SCORING_TOKENS):
            inputs = send_to_device(trainer.data_collator([encoded.rows[row] for row in batch]), trainer.args.device)
            scores = iter(scores_at(trainer.model, inputs)[0].tolist())
            for row in batch:
                scores_of_rows[row] = [next(scores) for _ in encoded.rows[row]["places"]]
    return scores_of_rows


def numbers(trainer: Any, encoded: Encoded) -> dict[str, float]:
    """Return a regression's ``loss``, ``pearson``, ``spearman``, and ``accuracy`` over ``disjoint_pairs``."""
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
    """Return a process reward model's scores.

    ``loss``; ``step_accuracy`` at even odds; ``accuracy``, right steps above wrong ones over disjoint pairs;
    ``answer_accuracy_<aggregate>``, answers without a wrong step above those with one.
    """
    rows = predictions(trainer, encoded)
    scores = [score for row in rows for score in row]
    targets = [float(target) for row in encoded.rows for target in row["targets"]]
    better, worse = disjoint_pairs(scores, [float(target >= 0.5) for target in targets])
    right = sum((score > 0) == (target >= 0.5) for score, target in zip(scores, targets, strict=True))
    scores_by_name = {
        "loss": _loss(trainer, scores, targets),
        "step_accuracy": right / len(scores),
        "accuracy": pair_accuracy(better, worse) if better else 0.5,
    }
    sound = [float(min(row["targets"]) >= 0.5) for row in encoded.rows]
    for how in get_args(Aggregate):
        better, worse = disjoint_pairs([combine_steps(row, how) for row in rows], sound)
        if better:
            scores_by_name[f"answer_accuracy_{how}"] = pair_accuracy(better, worse)
    return scores_by_name


def disjoint_pairs(scores: Sequence[float], targets: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the scores of the better and the worse side of pairs; each row is in one pair at most.

    Rows are sorted by target, and the lower half is paired with the upper one. Pairs of equal targets are skipped. The
    pairs share no rows, so they are independent.
    """
    order = sorted(range(len(scores)), key=lambda row: (targets[row], row))
    half = len(order) // 2
    upper = order[len(order) - half :]
    pairs = [(high, low) for low, high in zip(order[:half], upper, strict=True) if targets[high] > targets[low]]
    return [scores[high] for high, _ in pairs], [scores[low] for _, low in pairs]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 if either does not vary."""
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0; equal values share their mean rank."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        # Equal values from start to end share the mean of their ranks.
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end - 1) / 2
        start = end
    return ranks


def _loss(trainer: Any, scores: Sequence[float], targets: Sequence[float]) -> float:
    return float(number_loss(torch.tensor(scores), torch.tensor(targets), trainer.score_loss, 0.0))
