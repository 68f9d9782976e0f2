"""How good a reward model is on held-out pairs: accuracy against chance and length, calibration, a second scorer.

Torch-free: scores are given, or made by a function. Every number has its n and a 95 % interval.
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
"""Prompts, answers, whether each answer ended by itself, and its prompt's tools → one score each."""
Sides = tuple[list[list[dict[str, str]]], list[str], list[bool], list[str | None]]
"""The arguments of ``Score``."""
Scores = tuple[list[float], list[float]]
"""Of the chosen and of the rejected answers."""

RESAMPLES = 2000
MARGIN_BINS = 5
PAIRS_PER_BIN = 20
"""Fewer pairs make fewer bins of margins: an accuracy of less says nothing."""


def pair_accuracy(rows: Sequence[Row], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Accuracies of the scores of ``rows``' two answers, each with n and a Wilson interval.

    ``as_labeled`` counts pairs whose chosen answer scores higher: the labels' noise caps it. ``true`` asks whether
    scores order a pair as ``chosen_score`` and ``rejected_score`` do; pairs they tie are left out. ``longer`` is what
    always preferring the longer answer gets against the labels. A tie of the reward model is wrong, as in trl.
    ``by_source`` has the labeled accuracy of each source, ``margin`` the mean score difference.
    """
    right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
    sizes = [len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in rows]
    # equal lengths say nothing: half right, half wrong
    longer = sum(0.5 if size == 0 else float(size > 0) for size in sizes)
    found: dict[str, Any] = {
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
    ordered = [(gold, proxy) for gold, proxy in known if gold != 0]
    if ordered:
        found["true"] = wilson(sum(gold * proxy > 0 for gold, proxy in ordered), len(ordered)).as_dict()
        found["labels_true"] = wilson(sum(gold > 0 for gold, _ in ordered), len(ordered)).as_dict()
    return found


def read_sides(rows: Sequence[Row]) -> Sides:
    """Everything that a reward model reads of the pairs: all chosen answers, then all rejected ones."""
    both = [(row, side) for side in ("chosen", "rejected") for row in rows]
    return (
        [row["prompt"] for row, _ in both],
        [row[side][-1]["content"] for row, side in both],
        [is_finished(row, side) for row, side in both],
        [row.get("tools") for row, _ in both],
    )


def score_sides(sides: Sides, score: Score) -> Scores:
    """Scores of the chosen and of the rejected answers of what :func:`read_sides` returns."""
    scores = score(*sides)
    pairs = len(scores) // 2
    return scores[:pairs], scores[pairs:]


def score_pairs(rows: Sequence[Row], score: Score) -> Scores:
    """Scores of both answers of each pair."""
    return score_sides(read_sides(rows), score)


def pair_report(
    rows: Sequence[Row], scores: Scores, *, seed: int, second: tuple[str, Scores] | None = None
) -> dict[str, Any]:
    """Everything a scorecard says of a reward model on one set of pairs, but for whose it is. JSON-able.

    What :func:`pair_accuracy` has, ``margin`` with its interval, and beside it:

    - ``by_margin``: accuracy in up to five bins of like size, ``{low, high, n, accuracy}``. ``by_margin_of`` says of
      what: ``gold`` margins where at least half of the pairs have ones that differ, and then right is what gold says
      (is it wrong where the answers are close?); else the ``model``'s own, against the labels (is it right where it is
      sure?)
    - ``shorter_chosen``: accuracy on pairs whose chosen answer is the shorter one, in characters; null without any
    - ``length_correlation``: Spearman of score and length over all answers, pairs resampled as a whole;
      ``length_margin_correlation`` of the differences within pairs, which differing prompts cannot blur
    - ``calibration``: see :func:`align.evaluation.calibration.calibration`
    - ``agreement`` with ``second`` (its name and scores), or null: see :func:`agreement`
    """
    chosen, rejected = (np.asarray(side, dtype=np.float64) for side in scores)
    lengths = np.array([[len(row[side][-1]["content"]) for side in ("chosen", "rejected")] for row in rows])
    lengths = lengths.reshape(-1, 2)
    margins, gaps = chosen - rejected, lengths[:, 0] - lengths[:, 1]
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
    """A :func:`pair_report` of each reward model, with its ``stage`` and the pair set's name, ``task``.

    ``scores`` are the models' stages and scores: one, or two, each of which is then the other's second scorer.
    """
    found = []
    for at, (stage, own) in enumerate(scores):
        other = scores[1 - at] if len(scores) == 2 else None
        found.append({"stage": stage, "task": task, **pair_report(rows, own, seed=seed, second=other)})
    return found


def agreement(one: Scores, other: Scores, *, seed: int) -> dict[str, Any]:
    """How far two scorers agree about pairs.

    ``accuracy`` is the share they order alike, a tie of both included; ``kappa`` is what that is beyond chance, given
    how often each prefers the chosen answer: two good scorers agree often without looking at the same things.
    ``spearman`` is the rank correlation of their score differences.
    """
    first, second = (np.asarray(side[0]) - np.asarray(side[1]) for side in (one, other))
    signs = [np.sign(side).astype(int).tolist() for side in (first, second)]
    alike = sum(a == b for a, b in zip(*signs, strict=True))
    return {
        "accuracy": wilson(alike, len(first)).as_dict(),
        "kappa": cohen_kappa(*signs, resamples=RESAMPLES, seed=seed).as_dict(),
        "spearman": spearman(first, second, resamples=RESAMPLES, seed=seed).as_dict(),
    }


def _by_margin(rows: Sequence[Row], margins: np.ndarray) -> dict[str, Any]:
    """``by_margin`` and what it is of."""
    known = [row.get("chosen_score") is not None and row.get("rejected_score") is not None for row in rows]
    gold = np.array(
        [row["chosen_score"] - row["rejected_score"] if has else 0.0 for row, has in zip(rows, known, strict=True)]
    )
    by_gold = len(rows) > 0 and 2 * np.count_nonzero(gold) >= len(rows)
    if by_gold:
        sizes, right = np.abs(gold[gold != 0]), (gold * margins)[gold != 0] > 0
    else:
        sizes, right = np.abs(margins), margins > 0
    count = int(np.clip(len(sizes) // PAIRS_PER_BIN, 1, MARGIN_BINS))
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, count + 1))) if len(sizes) else np.zeros(0)
    places = np.searchsorted(edges[1:-1], sizes, side="right")  # a size on an edge is in the bin above
    bins = []
    for place in np.unique(places).tolist():
        inside = right[places == place]
        low, high = edges[place], edges[min(place + 1, len(edges) - 1)]
        accuracy = wilson(float(inside.sum()), len(inside)).as_dict()
        bins.append({"low": float(low), "high": float(high), "n": len(inside), "accuracy": accuracy})
    return {"by_margin_of": "gold" if by_gold else "model", "by_margin": bins}


def _by_source(rows: Sequence[Row], right: Sequence[float]) -> dict[str, Any]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, right, strict=True):
        groups.setdefault(str(row["source"]), []).append(value)
    return {source: wilson(sum(values), len(values)).as_dict() for source, values in sorted(groups.items())}
