"""Warning signs in an update's metrics: collapse, exploding lengths, a score that climbs while gold falls.

A loss or gradient that is not finite stops the run by itself (``trainer.py``); here are the failures that do not. Works
on logged numbers alone, so a resumed run raises what the uninterrupted one would have raised.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Entry = Mapping[str, float]
"""The metrics of one update."""

START = 3
"""Updates at the start whose mean is what later ones are compared with."""
WINDOW = 5
"""Updates per side of a comparison of trends."""
COLLAPSED_ENTROPY = 0.1
COLLAPSED_LENGTH = 0.25
EXPLODED_LENGTH = 2.0
MANY_CUT = 0.5
CLEAR = 2.0
"""Standard errors that a change of means must exceed."""


@dataclass(frozen=True)
class Alarm:
    """What is wrong, since which update; ``text`` says what it means and what usually helps."""

    name: str
    update: int
    text: str


def alarms(history: Sequence[Entry]) -> list[Alarm]:
    """Alarms that hold at the last of ``history``, one entry per update in order."""
    if len(history) <= START:
        return []
    update = int(history[-1]["update"])
    checks = (_collapse, _explosion, _over_optimization)
    return [Alarm(name, update, text) for name, text in (check(history) for check in checks) if text]


def _mean(history: Sequence[Entry], name: str) -> float:
    return statistics.fmean(entry[name] for entry in history)


def _collapse(history: Sequence[Entry]) -> tuple[str, str]:
    """Nearly all entropy gone, or answers cut down to a fraction of what they were."""
    now, text = history[-1], ""
    entropy, length = (_mean(history[:START], name) for name in ("entropy", "length"))
    if now["entropy"] < COLLAPSED_ENTROPY * entropy:
        text = (
            f"the policy's entropy fell from {entropy:.3g} to {now['entropy']:.3g} nats a token: it says nearly the "
            "same to everything, and has nothing left to explore. Raise kl_coef or entropy_coef, or lower learning_rate"
        )
    elif now["length"] < COLLAPSED_LENGTH * length:
        text = (
            f"responses fell from {length:.1f} to {now['length']:.1f} tokens: the score rewards saying little. Look at "
            "the samples, and check the reward model on short answers"
        )
    return "collapse", text


def _explosion(history: Sequence[Entry]) -> tuple[str, str]:
    """Answers twice as long and mostly cut off, though they used to end."""
    now, start = history[-1], history[:START]
    length, cut = _mean(start, "length"), _mean(start, "truncation_rate")
    if now["length"] > EXPLODED_LENGTH * length or (now["truncation_rate"] > MANY_CUT and cut < MANY_CUT / 2):
        return "length explosion", (
            f"responses grew from {length:.1f} to {now['length']:.1f} tokens, {now['truncation_rate']:.0%} of them cut "
            "off: the score rewards length, or ending is no longer learned. Set missing_eos_penalty or length_penalty, "
            "or raise kl_coef"
        )
    return "length explosion", ""


def _over_optimization(history: Sequence[Entry]) -> tuple[str, str]:
    """The score's mean clearly up and gold's clearly down from one window to the next (arXiv 2210.10760)."""
    name = "over-optimization"
    if len(history) < 2 * WINDOW or "gold" not in history[-1]:
        return name, ""
    before, after = history[-2 * WINDOW : -WINDOW], history[-WINDOW:]
    if _change(before, after, "score") > CLEAR and _change(before, after, "gold") < -CLEAR:
        return name, (
            f"in {WINDOW} updates the score rose from {_mean(before, 'score'):.3g} to {_mean(after, 'score'):.3g} "
            f"while gold fell from {_mean(before, 'gold'):.3g} to {_mean(after, 'gold'):.3g}: the policy has "
            "found what the reward model overrates. Keep an earlier checkpoint (keep: best), raise kl_coef, or train "
            "the reward model on this policy's responses"
        )
    return name, ""


def _change(before: Sequence[Entry], after: Sequence[Entry], name: str) -> float:
    """Difference of two windows' means in standard errors of it; infinite where nothing scatters."""
    sides = [[entry[name] for entry in side] for side in (before, after)]
    difference = statistics.fmean(sides[1]) - statistics.fmean(sides[0])
    error = sum(statistics.variance(side) / len(side) for side in sides) ** 0.5
    if error == 0:
        return 0.0 if difference == 0 else float("inf") if difference > 0 else float("-inf")
    return float(difference / error)
