"""How often a reward model prefers the better answer of held-out pairs, against two rivals: chance and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.data.rows import is_finished
from align.evaluation.statistics import wilson

Row = dict[str, Any]
Score = Callable[[list[list[dict[str, str]]], list[str], list[bool], list[str | None]], list[float]]
"""Prompts, answers and whether each answer ended by itself → one score each."""


def pair_accuracy(rows: Sequence[Row], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Accuracies of the scores of ``rows``' two answers, each with n and a Wilson interval.

    ``as_labelled`` counts pairs whose chosen answer scores higher: the labels' noise caps it. ``true`` asks whether
    scores order a pair as ``chosen_score`` and ``rejected_score`` do; pairs they tie are left out. ``longer`` is what
    always preferring the longer answer gets against the labels. A tie of the reward model is wrong, as in trl.
    ``by_source`` has the labelled accuracy of each source, ``margin`` the mean score difference.
    """
    right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
    sizes = [len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in rows]
    # equal lengths say nothing: half right, half wrong
    longer = sum(0.5 if size == 0 else float(size > 0) for size in sizes)
    found: dict[str, Any] = {
        "pairs": len(rows),
        "ties": sum(a == b for a, b in zip(chosen, rejected, strict=True)),
        "margin": sum(a - b for a, b in zip(chosen, rejected, strict=True)) / max(1, len(rows)),
        "as_labelled": wilson(sum(right), len(right)).as_dict(),
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


def score_pairs(rows: Sequence[Row], score: Score) -> dict[str, Any]:
    """Score both answers of each pair and report accuracies; see :func:`pair_accuracy`."""
    prompts = [row["prompt"] for row in rows]
    sides = [[row[side][-1]["content"] for row in rows] for side in ("chosen", "rejected")]
    finished = [is_finished(row, side) for side in ("chosen", "rejected") for row in rows]
    tools = [row.get("tools") for row in rows]
    scores = score(prompts + prompts, sides[0] + sides[1], finished, tools + tools)
    return pair_accuracy(rows, scores[: len(rows)], scores[len(rows) :])


def _by_source(rows: Sequence[Row], right: Sequence[float]) -> dict[str, Any]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, right, strict=True):
        groups.setdefault(str(row["source"]), []).append(value)
    return {source: wilson(sum(values), len(values)).as_dict() for source, values in sorted(groups.items())}
