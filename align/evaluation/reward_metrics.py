"""Metrics of a list of rewards in a scorecard: their sum, each of them, and what they return beside it. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

REWARD = "score_"
"""Prefix of the rewards of a list ``score:``, and of their metrics."""


def describe_rewards(weights: Mapping[str, float], columns: Collection[str]) -> dict[str, Any]:
    """Return the metrics of a list of rewards, by name: their sum, each of them, and their further metrics."""
    if not weights:
        return {}
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())
    entries: dict[str, dict[str, Any]] = {}
    entries["gold"] = {"title": "Score", "better": "higher", "unit": "score", "meaning": f"weighted sum: {terms}"}
    for name in columns:
        if not name.startswith(REWARD):
            continue
        title = name.removeprefix(REWARD)
        if title in weights:
            better = "higher" if weights[title] >= 0 else "lower"
            meaning = f"reward '{title}', of weight {weights[title]:g} in the score"
            entries[name] = {"title": title, "better": better, "unit": "score", "meaning": meaning}
        else:
            entries[name] = {"title": title, "better": None, "unit": "", "meaning": "metric that a reward returned"}
    return {name: {**entry, "task": "prompts"} for name, entry in entries.items()}
