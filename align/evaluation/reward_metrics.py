"""Metrics of a list of rewards in a scorecard: their sum, each of them, and what they return beside it. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from align.evaluation.prompt_metrics import ProgramDescription

SUM = "score"
"""Metric of the weighted sum of a list ``score:``."""
REWARD = f"{SUM}_"
"""Prefix of the metrics of the list's rewards, and of what they return beside their score."""


def describe_rewards(weights: Mapping[str, float], columns: Collection[str]) -> dict[str, ProgramDescription]:
    """Return direction and meaning of a list's metrics, by name; the direction is None for further metrics."""
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    described: dict[str, ProgramDescription] = {SUM: ("higher", f"weighted sum: {terms}")}
    for metric in columns:
        if not metric.startswith(REWARD):
            continue
        name = metric.removeprefix(REWARD)
        if name in weights:
            better = "higher" if weights[name] >= 0 else "lower"
            described[metric] = (better, f"reward '{name}', of weight {weights[name]:g} in the score")
        else:
            described[metric] = (None, "metric that a reward returned")
    return described
