"""Accuracy of a reward model on held-out pairs, against chance and length, its calibration, and a second scorer.

Every number has its n and a 95 % interval. Torch-free: scores come from the caller, or from a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.data.rows import is_finished
from align.evaluation.calibration import calibration
from align.evaluation.correlation import cohen_kappa, spearman
from align.evaluation.statistics import mean_interval, wilson

Row = dict[str, Any]
Score = Callable[[list[list[dict[str, str]]], list[str], list[bool], list[str | None]], list[float]]
"""Prompts, answers, flags of answers that ended by themselves, and the prompts' tools → one score each."""
Sides = tuple[list[list[dict[str, str]]], list[str], list[bool], list[str | None]]
"""The arguments of ``Score``."""
Scores = tuple[list[float], list[float]]
"""Scores of the chosen answers, and of the rejected answers."""

RESAMPLES = 2000
MARGIN_BINS = 5
PAIRS_PER_BIN = 20
"""Fewest pairs in a bin of margins; fewer pairs in all make fewer bins."""


def pair_accuracy(rows: Sequence[Row], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Return the accuracies of the scores of ``rows``' two answers, each with n and a Wilson interval.

    ``as_labeled`` counts pairs whose chosen answer scores higher; noise in the labels limits it. ``true`` counts pairs
    that scores order as ``chosen_score`` and ``rejected_score`` do; pairs that those tie are left out. ``longer`` is
    the accuracy of always preferring the longer answer. A tie of the reward model is wrong, as in trl. ``by_source``
    has the labeled accuracy of each source, ``margin`` the mean score difference.
    """
    right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
    gaps = [len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in rows]
    longer = sum(0.5 if gap == 0 else float(gap > 0) for gap in gaps)  # equal lengths count half
    accuracies: dict[str, Any] = {
        "pairs": len(rows),
        "ties": sum(a == b for a, b in zip(chosen, rejected, strict=True)),
        "margin": sum(a - b for a, b in zip(chosen, rejected, strict=True)) / max(1, len(rows)),
        "as_labeled": wilson(sum(right), len(right)).as_dict(),
        "longer": wilson(longer, len(rows)).as_dict(),
        "true": None,
        "labels_true": None,
        "by_source": _by_source(rows, right),
    }
    known = [
        (row["chosen_score"] - row["rejected_score"], a - b)
        for row, a, b in zip(rows, chosen, rejected, strict=True)
        if row.get("chosen_score") is not None and row.get("rejected_score") is not None
    ]
    # Pairs that tie by gold have no right order.
    ordered = [(gold, proxy) for gold, proxy in known if gold != 0]
    if ordered:
        accuracies["true"] = wilson(sum(gold * proxy > 0 for gold, proxy in ordered), len(ordered)).as_dict()
        accuracies["labels_true"] = wilson(sum(gold > 0 for gold, _ in ordered), len(ordered)).as_dict()
    return accuracies


def read_sides(rows: Sequence[Row]) -> Sides:
    """Return a reward model's inputs for the pairs: all chosen answers, then all rejected ones."""
    both = [(row, side) for side in ("chosen", "rejected") for row in rows]
    return (
        [[*row["prompt"], *row[side][:-1]] for row, side in both],
        [row[side][-1]["content"] for row, side in both],
        [is_finished(row, side) for row, side in both],
        [row.get("tools") for row, _ in both],
    )


def score_sides(sides: Sides, score: Score) -> Scores:
    """Return the scores of the chosen and of the rejected answers of :func:`read_sides`."""
    scores = score(*sides)
    pairs = len(scores) // 2
    return scores[:pairs], scores[pairs:]


def pair_report(
    rows: Sequence[Row], scores: Scores, *, seed: int, second: tuple[str, Scores] | None = None
) -> dict[str, Any]:
    """Return a scorecard's report on a reward model on one set of pairs. JSON-able.

    It has the fields of :func:`pair_accuracy`, ``margin`` with its interval, and:

    - ``by_margin``: accuracy in up to five bins of similar size, ``{low, high, n, accuracy}``. ``by_margin_of`` names
      the margins: ``gold`` where at least half of the pairs have gold scores that differ, with right as gold orders
      them (errors should concentrate where the answers are close); else the ``model``'s own, with right as labeled
      (errors should be rare where it is confident)
    - ``shorter_chosen``: accuracy on pairs whose chosen answer is the shorter one, in characters; null without any
    - ``length_correlation``: Spearman of score and length over all answers, pairs resampled as a whole;
      ``length_margin_correlation`` of the differences within pairs, which differing prompts cannot blur
    - ``calibration``: see :func:`align.evaluation.calibration.calibration`
    - ``agreement`` with ``second`` (its name and scores), or null: see :func:`agreement`
    """
    chosen, rejected = (np.asarray(side, dtype=np.float64) for side in scores)
    lengths = np.array([[len(row[side][-1]["content"]) for side in ("chosen", "rejected")] for row in rows])
    lengths = lengths.reshape(-1, 2)
    margins = _margins(scores)
    gaps = lengths[:, 0] - lengths[:, 1]
    shorter = margins[gaps < 0] > 0
    both = np.column_stack([chosen, rejected])
    return {
        **pair_accuracy(rows, *scores),
        "margin": mean_interval(margins, resamples=RESAMPLES, seed=seed).as_dict(),
        **_by_margin(rows, margins),
        "shorter_chosen": wilson(float(shorter.sum()), len(shorter)).as_dict() if len(shorter) else None,
        "length_correlation": spearman(both, lengths, resamples=RESAMPLES, seed=seed).as_dict(),
        "length_margin_correlation": spearman(margins, gaps, resamples=RESAMPLES, seed=seed).as_dict(),
        "calibration": calibration(margins.tolist(), seed=seed),
        "agreement": None if second is None else {"other": second[0], **agreement(scores, second[1], seed=seed)},
    }


def pair_reports(
    rows: Sequence[Row], scores: Sequence[tuple[str, Scores]], *, seed: int, task: str
) -> list[dict[str, Any]]:
    """Return a :func:`pair_report` on each reward model, with its ``stage`` and the pair set's name, ``task``.

    ``scores`` are the stages and scores of one model, or of two, each of which is then the other's second scorer.
    """
    reports = []
    for index, (stage, model_scores) in enumerate(scores):
        # With two models each is the other's second opinion.
        second = scores[1 - index] if len(scores) == 2 else None
        reports.append({"stage": stage, "task": task, **pair_report(rows, model_scores, seed=seed, second=second)})
    return reports


def agreement(first: Scores, second: Scores, *, seed: int) -> dict[str, Any]:
    """Return the agreement of two scorers on the pairs that both have a score difference for.

    ``accuracy`` is the share they order alike, a tie of both included. ``kappa`` is the agreement beyond chance, given
    how often each prefers the chosen answer: two accurate scorers agree often even if their errors are unrelated.
    ``spearman`` is the rank correlation of their score differences.
    """
    margins = np.stack([_margins(first), _margins(second)])
    margins = margins[:, ~np.isnan(margins).any(axis=0)]
    signs = [np.sign(margin).astype(int).tolist() for margin in margins]
    equal = sum(a == b for a, b in zip(*signs, strict=True))
    return {
        "accuracy": wilson(equal, len(margins[0])).as_dict(),
        "kappa": cohen_kappa(*signs, resamples=RESAMPLES, seed=seed).as_dict(),
        "spearman": spearman(*margins, resamples=RESAMPLES, seed=seed).as_dict(),
    }


def _margins(scores: Scores) -> np.ndarray:
    """Return (N,) chosen minus rejected scores; NaN where a score is NaN or both are the same infinity."""
    with np.errstate(invalid="ignore"):
        margins: np.ndarray = np.asarray(scores[0], dtype=np.float64) - np.asarray(scores[1], dtype=np.float64)
    return margins


def _by_margin(rows: Sequence[Row], margins: np.ndarray) -> dict[str, Any]:
    """Return ``by_margin`` and ``by_margin_of``; ``margins`` are (N,)."""
    has_gold = [row.get("chosen_score") is not None and row.get("rejected_score") is not None for row in rows]
    gold = np.array(
        [
            row["chosen_score"] - row["rejected_score"] if is_known else 0.0
            for row, is_known in zip(rows, has_gold, strict=True)
        ]
    )
    # Gold scores measure how hard a pair is; without them for at least half of the pairs, the model's own margin does.
    by_gold = len(rows) > 0 and 2 * np.count_nonzero(gold) >= len(rows)
    if by_gold:
        sizes = np.abs(gold[gold != 0])
        right = (gold * margins)[gold != 0] > 0
    else:
        # A margin that is not finite has no place in a bin.
        finite = margins[np.isfinite(margins)]
        sizes = np.abs(finite)
        right = finite > 0
    count = int(np.clip(len(sizes) // PAIRS_PER_BIN, 1, MARGIN_BINS))
    # Bins with equally many pairs; equal quantiles of tied sizes collapse into one edge.
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, count + 1))) if len(sizes) else np.zeros(0)
    bin_of = np.searchsorted(edges[1:-1], sizes, side="right")  # a size on an edge is in the bin above
    bins = []
    for index in np.unique(bin_of).tolist():
        inside = right[bin_of == index]
        low, high = edges[index], edges[min(index + 1, len(edges) - 1)]
        accuracy = wilson(float(inside.sum()), len(inside)).as_dict()
        bins.append({"low": float(low), "high": float(high), "n": len(inside), "accuracy": accuracy})
    return {"by_margin_of": "gold" if by_gold else "model", "by_margin": bins}


def _by_source(rows: Sequence[Row], right: Sequence[float]) -> dict[str, Any]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, right, strict=True):
        groups.setdefault(str(row["source"]), []).append(value)
    return {source: wilson(sum(values), len(values)).as_dict() for source, values in sorted(groups.items())}
