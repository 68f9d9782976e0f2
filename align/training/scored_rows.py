"""Rows for reward models that are trained on single answers: one number per answer, or one per step.

``rows.py`` encodes pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.data.rows import is_finished
from align.errors import UserError
from align.models.chat.render import render_answered
from align.models.reward import tokenize_steps
from align.training.rows import TOO_LONG, Encoded, Row

NO_SCORE = "left out, no score"
OTHER_STEPS = "left out, its text has another number of steps than it has labels"


def scored_answers(rows: Sequence[Row]) -> list[Row]:
    """Return one row with ``completion`` and ``target`` per answer.

    A pair has two answers (``chosen_score``, ``rejected_score``); another row has ``score``, or ``label`` as 1 or 0.
    The same answer to the same prompt is used once, so rows sampled into several pairs do not count twice.
    """
    answers: dict[str, Row] = {}
    for row in rows:
        for answer, target, finished in _answers(row):
            single = {
                name: value for name, value in row.items() if name not in ("chosen", "rejected", "label", "score")
            }
            # Two answers are the same with equal prompt, text, end and tools.
            key = repr((row["prompt"], answer, finished, row.get("tools")))
            answers.setdefault(key, {**single, "completion": answer, "target": target, "completion_finished": finished})
    return list(answers.values())


def _answers(row: Row) -> list[tuple[Any, float | None, bool]]:
    if row.get("chosen") is not None:
        return [(row[side], row.get(f"{side}_score"), is_finished(row, side)) for side in ("chosen", "rejected")]
    label = row.get("label")
    target = row.get("score") if label is None else float(label)
    return [(row["completion"], target, is_finished(row, "completion"))]


@dataclass(frozen=True)
class Scale:
    """Standardizes targets: subtracts ``mean`` and divides by ``deviation``."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, target: float) -> float:
        return (target - self.mean) / self.deviation


def scale_of(rows: Sequence[Row], stage: str) -> Scale:
    """Return mean and standard deviation of the rows' targets. Raises ``UserError`` for no or equal targets."""
    targets = [row["target"] for row in rows if row["target"] is not None]
    if not targets:
        raise UserError(
            f"{stage}: objective is regression, and none of the {len(rows)} training answers has a score. It is read "
            "from chosen_score and rejected_score of pairs, from score of instructions (a `score` step writes it), or "
            "from label of unpaired rows."
        )
    # Not deviation == 0: the mean of equal scores may be off by rounding.
    if min(targets) == max(targets):
        raise UserError(
            f"{stage}: all {len(targets)} training answers have the score {targets[0]:g}: nothing to learn."
        )
    mean = sum(targets) / len(targets)
    deviation = math.sqrt(sum((target - mean) ** 2 for target in targets) / len(targets))
    return Scale(mean, deviation)


def encode_scored(tokenizer: Any, rows: Sequence[Row], max_length: int, scale: Scale) -> Encoded:
    """Encode ``input_ids`` (prompt and answer) and ``targets``, a list with a number; skip rows that are too long."""
    out = Encoded()
    for row in rows:
        if row["target"] is None:
            out.count(NO_SCORE)
            continue
        ids = render_answered(tokenizer, row)
        if len(ids) > max_length:
            out.count(TOO_LONG)
            continue
        out.add({"input_ids": ids, "places": [len(ids) - 1], "targets": [scale(row["target"])]}, len(ids), row)  # type: ignore[list-item, dict-item]
    return out


def stepwise_answers(rows: Sequence[Row], separator: str, stage: str) -> list[Row]:
    """Return rows whose ``completion`` joins their steps by ``separator``. Raises ``UserError`` for no steps."""
    answers = [
        {**row, "completion": [{"role": "assistant", "content": separator.join(s["content"] for s in row["steps"])}]}
        for row in rows
        if row.get("steps")
    ]
    if not answers:
        raise UserError(
            f"{stage}: objective is process, and none of the {len(rows)} rows has steps. Build them with a recipe of "
            "kind unpaired and format stepwise (prompt, completions, labels)."
        )
    return answers


def encode_steps(tokenizer: Any, rows: Sequence[Row], max_length: int, separator: str) -> Encoded:
    """Encode ``input_ids``, ``places`` (each step's last token) and ``targets`` (each step's label, 0 to 1)."""
    out = Encoded()
    for row in rows:
        finished = is_finished(row, "completion")
        ids, places = tokenize_steps(
            tokenizer, row["prompt"], row["completion"], separator, finished=finished, tools=row.get("tools")
        )
        targets = [float(step["label"]) for step in row["steps"] if step["content"].strip()]
        if len(places) != len(targets):
            out.count(OTHER_STEPS)
            continue
        if len(ids) > max_length:
            out.count(TOO_LONG)
            continue
        out.add({"input_ids": ids, "places": places, "targets": targets}, len(ids), row)  # type: ignore[dict-item]
    return out
