"""Warning signs in an update's metrics: a constant score, divergence, collapse, exploding lengths, exploited rewards.

A loss or gradient that is not finite stops the run by itself (``trainer.py``); these failures do not. They are detected
from logged metrics only, so a resumed run raises the same alarms as an uninterrupted run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Entry = Mapping[str, float]
"""The metrics of one update."""

START = 3
"""Updates at the start; later ones are compared with their mean."""
WINDOW = 5
"""Updates per side of a comparison of trends."""
COLLAPSED_ENTROPY = 0.25
SURGED_ENTROPY = 2.0
COLLAPSED_LENGTH = 0.25
EXPLODED_LENGTH = 2.0
MANY_CUT = 0.5
COLLAPSED_CALLS = 0.1
FEW_CALLS = 0.2
"""Calls of tools per episode at the start below which none can be missed."""
ALL_CUT = 0.95
"""Share of responses cut off at ``max_tokens`` that means that none ends, also from the start."""
KL_PER_TOKEN = 1.0
"""Nats a token: far above the KL of healthy learning (0.2 in the quickstart, 0.5 between a model and its base)."""
LEAST_KL = 5.0
"""Nats a response below which no KL is an alarm, however short the responses."""
SURGED_GRADIENT = 20.0
"""Gradient norms of the policy, as a multiple of their mean at the start. Healthy ones stay within a factor of 2."""
CONSTANT_UPDATES = 2
"""Updates without any difference between scores, which have no learning signal."""
CLEAR = 2.0
"""Standard errors that a change of means must exceed."""
SPAN = 8
"""Updates in which the score's trend is compared with gold's."""
CLEAR_TREND = 3.0
"""Standard errors that the slope of a line through the scores must exceed: 1 in 100 flat lines of 8 points does."""
MANY_IDENTICAL = 0.5
"""Share of prompts whose most common answer is also another prompt's, above which all get the same answer."""
LENGTH_CORRELATION = 0.6
"""Correlation of scores with lengths, in ``START`` updates, above which the score is bought with length."""
MARKER_RISE = 0.25
"""Rise of the share of responses with a word or sign that the score follows."""
OTHER_EXPERTS = 0.1
"""Share of choices of experts that differ between engine and trainer. With such differences training collapsed in
arXiv 2510.11370; an engine in bfloat16 changed 0.5% in a small model (docs/models.md)."""
MOST_REPEATS = 4
"""Updates that a line names at which an alarm was raised again."""
CONSTANT_SCORE, MARKER, FAILURES = "constant score", "marker", "failures"


@dataclass(frozen=True)
class Alarm:
    """A failure, and the update since which it holds; ``text`` explains it and the usual remedy."""

    name: str
    update: int
    text: str


def alarms(history: Sequence[Entry]) -> list[Alarm]:
    """Return the alarms that hold at the last of ``history``, which has one entry per update in order."""
    if not history:
        return []
    update = int(history[-1]["update"])
    if history[-1].get("failure_rate") == 1.0:
        return [Alarm(FAILURES, update, _failures(history))]
    # An update in which every episode failed says nothing about the policy.
    history = [entry for entry in history if entry.get("failure_rate", 0.0) < 1.0]
    checks = {**CHECKS, **LATER_CHECKS} if len(history) > START else CHECKS
    return [Alarm(name, update, text) for name, check in checks.items() if (text := check(history))]


def new_alarms(history: Sequence[Entry]) -> list[Alarm]:
    """Return the alarms that hold at the last entry of ``history`` and did not at the entry before."""
    # Each failure is reported when it begins, not in every update in which it holds.
    earlier = {alarm.name for alarm in alarms(history[:-1])}
    return [alarm for alarm in alarms(history) if alarm.name not in earlier]


def count_alarms(raised: Sequence[Alarm]) -> list[str]:
    """Return a line for each name: ``update 3: KL, again at 8, 15, … (5 in all)``."""
    updates: dict[str, list[int]] = {}
    for alarm in raised:
        updates.setdefault(alarm.name, []).append(alarm.update)
    lines = []
    for name, (first, *others) in updates.items():
        line = f"update {first}: {name}"
        if others:
            shown = ", ".join(map(str, others[:MOST_REPEATS]))
            more = f", … ({len(others) + 1} in all)" if len(others) > MOST_REPEATS else ""
            line += f", again at {shown}{more}"
        lines.append(line)
    return lines


def mean(history: Sequence[Entry], name: str) -> float:
    """Return the mean of a metric over updates."""
    return statistics.fmean(entry[name] for entry in history)


def _constant_score(history: Sequence[Entry]) -> str:
    """Return an alarm for updates in which all responses have the same score: every advantage is then 0."""
    latest = history[-CONSTANT_UPDATES:]
    if len(latest) < CONSTANT_UPDATES or any(entry.get("score_range", 1.0) > 0 for entry in latest):
        return ""
    value = latest[-1]["score"]
    earlier = [entry["score"] for entry in history[:-CONSTANT_UPDATES]]
    # A policy that has learned everything rises to the constant; a broken score is constant from the start, or falls.
    if earlier and value >= max(earlier) and value > min(earlier):
        return (
            f"every response of {CONSTANT_UPDATES} updates scored {value:g}, the highest of the run: by this score "
            "the task is solved, and nothing is left to learn. Use harder prompts, or fewer updates"
        )
    return (
        f"every response of {CONSTANT_UPDATES} updates scored {value:g}, so the policy learns nothing. "
        "Check the score on the rows' own reference answers"
    )


def _kl(history: Sequence[Entry]) -> str:
    """Return an alarm for a policy that is further from its reference than learning explains."""
    latest = history[-1]
    kl = latest.get("kl", 0.0)
    length = max(latest["length"], 1.0)
    if kl > LEAST_KL and kl / length > KL_PER_TOKEN:
        return (
            f"the KL to the reference is {kl:.3g} nats in {length:.1f} tokens: the policy has left the language that "
            "it started from. Do not use it. Lower learning_rate, or raise kl_coef or set kl_budget"
        )
    return ""


def _routers(history: Sequence[Entry]) -> str:
    """Return an alarm for a mixture of experts whose engine chooses other experts than the trainer."""
    share = history[-1].get("router_disagreement", 0.0)
    if share > OTHER_EXPERTS:
        return (
            f"engine and trainer choose other experts in {share:.0%} of the layers of a token, so their "
            "log-probabilities belong to different models. Set the same type for both (precision and "
            "runtime.engine.dtype), and keep importance_cap"
        )
    return ""


def _truncation(history: Sequence[Entry]) -> str:
    """Return an alarm for responses that never end."""
    latest = history[-START:]
    if len(latest) == START and all(entry["truncation_rate"] >= ALL_CUT for entry in latest):
        return (
            f"{latest[-1]['truncation_rate']:.0%} of the responses are cut off at max_tokens, for {START} updates: "
            "their scores are of unfinished answers. Raise max_tokens, set missing_eos_penalty, or check that SFT "
            "taught the end token"
        )
    return ""


def _entropy_surge(history: Sequence[Entry]) -> str:
    """Return an alarm for entropy that has doubled, which means that the policy is losing what it had learned."""
    entropy = mean(history[:START], "entropy")
    if history[-1]["entropy"] > SURGED_ENTROPY * entropy:
        return (
            f"the policy's entropy rose from {entropy:.3g} to {history[-1]['entropy']:.3g} nats a token: its answers "
            "get more random. Lower learning_rate, or lower entropy_coef if it is set"
        )
    return ""


def _gradient(history: Sequence[Entry]) -> str:
    """Return an alarm for the policy's gradients many times as large as they were, in two updates."""
    name = "grad_norm_policy"
    if name not in history[-1] or name not in history[0]:
        return ""
    start = mean(history[:START], name)
    if start > 0 and all(entry[name] > SURGED_GRADIENT * start for entry in history[-2:]):
        return (
            f"the policy's gradient norm rose from {start:.3g} to {history[-1][name]:.3g}: training is about to "
            "diverge. Lower learning_rate or max_grad_norm"
        )
    return ""


def _length_correlation(history: Sequence[Entry]) -> str:
    """Return an alarm for scores that follow the responses' lengths."""
    latest = history[-START:]
    if len(latest) < START or any(entry.get("score_length_correlation", 0.0) <= LENGTH_CORRELATION for entry in latest):
        return ""
    return (
        f"the score follows the length of the responses (correlation {latest[-1]['score_length_correlation']:.2f}, for "
        f"{START} updates): longer responses are what the policy learns. Look at the longest, and set length_penalty "
        "or correct the score"
    )


def _marker(history: Sequence[Entry]) -> str:
    """Return an alarm for words or signs that the score follows, and that most responses have by now."""
    latest = history[-START:]
    shares = [entry.get("marker_share", 0.0) for entry in latest]
    if len(latest) < START or min(shares) <= MANY_CUT or latest[-1]["marker_rise"] < MARKER_RISE:
        return ""
    return (
        f"{shares[-1]:.0%} of the responses have a word or sign that neither prompt nor reference has and that scored "
        "higher: the score may pay for it, whatever the answer. Look at the samples, and correct the score"
    )


def _identical_answers(history: Sequence[Entry]) -> str:
    """Return an alarm for the same answer to most prompts, unless the start had as many."""
    latest = history[-START:]
    if any("identical_answers" not in entry for entry in (*history[:START], *latest)):
        return ""
    # Some tasks have few right answers, such as yes and no. There many answers are equal from the start.
    share = min(entry["identical_answers"] for entry in latest)
    if share <= MANY_IDENTICAL or mean(history[:START], "identical_answers") > share / 2:
        return ""
    return (
        f"{share:.0%} of the prompts get an answer that other prompts get as well, for {START} updates: the score does "
        "not ask for an answer to the prompt. Look at the samples, and correct the score"
    )


def _open_thoughts(history: Sequence[Entry]) -> str:
    """Return an alarm for responses that end inside their thought, more than at first, and score no less."""
    latest = history[-START:]
    # An update without any thought has no such metric. A policy may learn this within two updates, so the first update
    # counts as the start, and not the mean of the first three.
    share = min(entry.get("open_thoughts", 0.0) for entry in latest)
    at_start = history[0].get("open_thoughts", 0.0)
    if share <= MANY_CUT or at_start > share / 2 or mean(latest, "score") < history[0]["score"]:
        return ""
    return (
        f"{latest[-1]['open_thoughts']:.0%} of the responses end inside their thought, {at_start:.0%} at the start, "
        "and the score did not fall: it is reached without an answer. Score the text after the thought (align's "
        "verifiers do), and look at the samples"
    )


def _collapse(history: Sequence[Entry]) -> str:
    """Return an alarm for entropy that is nearly gone without a higher score, or responses a fraction as long.

    A policy that has learned a task with one right answer is sure of it: entropy also falls in healthy runs.
    """
    latest = history[-1]
    entropy = mean(history[:START], "entropy")
    length = mean(history[:START], "length")
    is_better = mean(history[-WINDOW:], "score") > mean(history[:START], "score")
    if latest["entropy"] < COLLAPSED_ENTROPY * entropy and not is_better:
        return (
            f"the policy's entropy fell from {entropy:.3g} to {latest['entropy']:.3g} nats a token, and the score did "
            "not rise: it no longer explores. Raise kl_coef or entropy_coef, or lower learning_rate"
        )
    if latest["length"] < COLLAPSED_LENGTH * length:
        return (
            f"responses fell from {length:.1f} to {latest['length']:.1f} tokens: the score rewards short answers. "
            "Look at the samples, and check the score of short answers"
        )
    return ""


def _explosion(history: Sequence[Entry]) -> str:
    """Return an alarm for responses twice as long as they were, or mostly truncated though they used to end."""
    latest = history[-1]
    length = mean(history[:START], "length")
    truncation = mean(history[:START], "truncation_rate")
    is_truncated = latest["truncation_rate"] > MANY_CUT and truncation < MANY_CUT / 2
    if latest["length"] > EXPLODED_LENGTH * length or is_truncated:
        return (
            f"responses grew from {length:.1f} to {latest['length']:.1f} tokens, {latest['truncation_rate']:.0%} of "
            "them truncated: the score rewards length, or the policy no longer learns to stop. Set missing_eos_penalty "
            "or length_penalty, or raise kl_coef"
        )
    return ""


def _over_optimization(history: Sequence[Entry]) -> str:
    """Return an alarm for a mean score that clearly rises while gold clearly falls, or no longer rises (2210.10760).

    Scores scatter from update to update. A fall is a difference between two windows in its standard errors. A constant
    gold score is detected later: over ``SPAN`` updates a line through the score rises steeply for its scatter, and a
    line through gold does not rise at all.
    """
    if "gold" not in history[-1]:
        return ""
    remedy = (
        "the policy exploits what the score overrates. Keep an earlier checkpoint (keep: best), raise kl_coef, or "
        "correct the score on this policy's responses"
    )
    # 1. A sudden fall: compare the last window with the window before.
    before = history[-2 * WINDOW : -WINDOW]
    after = history[-WINDOW:]
    has_windows = len(history) >= 2 * WINDOW
    if has_windows and change(before, after, "score") > CLEAR and change(before, after, "gold") < -CLEAR:
        return (
            f"in {WINDOW} updates the score rose from {mean(before, 'score'):.3g} to {mean(after, 'score'):.3g} "
            f"while gold fell from {mean(before, 'gold'):.3g} to {mean(after, 'gold'):.3g}: {remedy}"
        )
    # 2. A slow divergence: fit lines through the last ``SPAN`` updates.
    latest = history[-SPAN:]
    has_span = len(history) >= SPAN + START
    if has_span and trend(latest, "score") > CLEAR_TREND and trend(latest, "gold") <= 0:
        first, last = latest[: SPAN // 2], latest[SPAN // 2 :]
        return (
            f"over {SPAN} updates the score rose (means of halves {mean(first, 'score'):.3g} and "
            f"{mean(last, 'score'):.3g}) while gold did not ({mean(first, 'gold'):.3g} and "
            f"{mean(last, 'gold'):.3g}): {remedy}"
        )
    return ""


def _calls(history: Sequence[Entry]) -> str:
    """Return an alarm for episodes that no longer call tools, or mostly call them until ``max_turns`` ends them."""
    latest = history[-1]
    start = history[:START]
    if "calls" not in latest:
        return ""
    calls = mean(start, "calls")
    at_limit = mean(start, "max_turns_rate")
    if calls >= FEW_CALLS and latest["calls"] < COLLAPSED_CALLS * calls:
        return (
            f"calls fell from {calls:.2g} to {latest['calls']:.2g} an episode: the policy no longer uses its tools. "
            "Check that the score needs them, and what errors they answer with"
        )
    if latest["max_turns_rate"] > MANY_CUT and at_limit < MANY_CUT / 2:
        return (
            f"max_turns ends {latest['max_turns_rate']:.0%} of the episodes, {at_limit:.0%} at the start: the policy "
            "calls tools without coming to an answer. Score the end of an episode, or subtract a penalty for each call"
        )
    return ""


def _failures(history: Sequence[Entry]) -> str:
    """Return an alarm for an environment, or a simulated user, that fails in most of the episodes."""
    rate = history[-1].get("failure_rate", 0.0)
    if rate <= MANY_CUT:
        return ""
    return (
        f"the environment, or the user that is simulated in it, failed in {rate:.0%} of the episodes: nothing is "
        "learned from these. The stored rollouts have the reason of each as `failure`"
    )


Check = Callable[[Sequence[Entry]], str]
"""Returns the text of an alarm; empty if it does not hold."""
CHECKS: Mapping[str, Check] = {
    CONSTANT_SCORE: _constant_score,
    "KL": _kl,
    "truncation": _truncation,
    FAILURES: _failures,
    "routers": _routers,
    "length correlation": _length_correlation,
    MARKER: _marker,
}
"""Checks that need no start to compare with, by the name of the alarm: a run of few updates must not end silently."""
LATER_CHECKS: Mapping[str, Check] = {
    "collapse": _collapse,
    "identical answers": _identical_answers,
    "open thoughts": _open_thoughts,
    "entropy": _entropy_surge,
    "gradient": _gradient,
    "length explosion": _explosion,
    "over-optimization": _over_optimization,
    "calls": _calls,
}
"""Checks that compare with the mean of the first ``START`` updates."""


def change(before: Sequence[Entry], after: Sequence[Entry], name: str) -> float:
    """Return the difference of two windows' means in its standard errors; infinite if values do not vary."""
    windows = [[entry[name] for entry in window] for window in (before, after)]
    difference = statistics.fmean(windows[1]) - statistics.fmean(windows[0])
    # The standard error of a difference of two means (Welch).
    error = sum(statistics.variance(window) / len(window) for window in windows) ** 0.5
    if error != 0:
        return float(difference / error)
    return math.copysign(math.inf, difference) if difference else 0.0


def trend(history: Sequence[Entry], name: str) -> float:
    """Return the slope of a least-squares line through the values in its standard errors (Student's t)."""
    values = [entry[name] for entry in history]
    count = len(values)
    # The middle is the mean of the indices, so ``spread`` is their sum of squares and ``slope`` the usual quotient.
    middle = (count - 1) / 2
    average = statistics.fmean(values)
    spread = sum((index - middle) ** 2 for index in range(count))
    slope = sum((index - middle) * value for index, value in enumerate(values)) / spread
    residuals = [value - average - slope * (index - middle) for index, value in enumerate(values)]
    # A line has two parameters, which leaves ``count - 2`` degrees of freedom.
    error = (sum(residual**2 for residual in residuals) / (count - 2) / spread) ** 0.5
    # Values on a line leave residuals of rounding only; their slope is exact.
    if error > 1e-12 * abs(slope):
        return float(slope / error)
    return math.copysign(math.inf, slope) if slope else 0.0
