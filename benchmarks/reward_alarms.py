"""Alarms that were measured and not kept: functions of the metrics of all updates so far (docs/ppo.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from align.rl.alarms import WINDOW, change, trend

History = Sequence[Mapping[str, float]]
CLEAR = 3.0


def score_per_token(history: History) -> bool:
    """Return True if answers get shorter while the score rises, or longer without more score per token."""
    if len(history) < 2 * WINDOW:
        return False
    before, after = history[:WINDOW], history[-WINDOW:]
    rises = change(before, after, "score") > CLEAR
    return rises and change(before, after, "score_per_token") < 0


def second_reward(history: History) -> bool:
    """Return True if the score rises and a second reward falls from its best window."""
    if len(history) < 2 * WINDOW:
        return False
    before, after = history[:WINDOW], history[-WINDOW:]
    return change(before, after, "score") > CLEAR and change(before, after, "gold") < -CLEAR


def disagreement(history: History) -> bool:
    """Return True if a strict and a lenient verifier disagree more and more."""
    if len(history) < 2 * WINDOW:
        return False
    return trend(history[-2 * WINDOW :], "disagreement") > CLEAR


CANDIDATES: dict[str, Callable[[History], bool]] = {
    "score per token": score_per_token,
    "second reward from the start": second_reward,
    "verifiers disagree": disagreement,
}
