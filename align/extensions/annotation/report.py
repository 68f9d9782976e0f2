"""Statistics of a set: agreement, comparisons with a stopping rule, consistency, gold accuracy, time."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.errors import require_extra
from align.evaluation.statistics import Estimate, percentiles, wilson
from align.extensions.annotation.bradley_terry import Game, Strengths, strengths
from align.extensions.annotation.confidence import ALPHA, confidence_sequence
from align.store.annotations import Answer, Pair

RESAMPLES = 1000
SAME = 0.05
"""An interval of a share that is within this distance of 1/2 shows that no difference matters."""


@dataclass(frozen=True)
class Comparison:
    """A share in [0, 1] with an interval that is valid at every time, and what it decides."""

    name: str
    share: float
    low: float
    high: float
    n: int
    ties: int
    decision: str
    """``clear``, ``same`` (no difference that matters) or ``open``."""


@dataclass(frozen=True)
class Annotator:
    """Statistics of one annotator."""

    answers: int
    seconds: float
    """Median seconds for a pair."""
    consistency: Estimate
    """Share of hidden duplicates with the same verdict."""
    gold: Estimate
    """Share of gold questions with the right verdict."""


@dataclass(frozen=True)
class SetReport:
    """All statistics of a set."""

    pairs: int
    answered: int
    verdicts: dict[str, int]
    annotators: dict[str, Annotator]
    alpha: Estimate | None
    """Krippendorff's alpha; None if no pair has two annotators."""
    left: Estimate
    """Share of decisive verdicts for the answer on the left."""
    comparisons: list[Comparison]
    strengths: Strengths | None
    active: int
    """Answers to actively selected pairs, which comparisons ignore."""
    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def may_stop(self) -> bool:
        """True if every comparison is decided."""
        return bool(self.comparisons) and all(line.decision != "open" for line in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "pairs": self.pairs,
            "answered": self.answered,
            "verdicts": self.verdicts,
            "annotators": {
                name: {
                    "answers": line.answers,
                    "seconds": line.seconds,
                    "consistency": line.consistency.as_dict(),
                    "gold": line.gold.as_dict(),
                }
                for name, line in self.annotators.items()
            },
            "alpha": None if self.alpha is None else self.alpha.as_dict(),
            "left": self.left.as_dict(),
            "comparisons": [vars(line) for line in self.comparisons],
            "strengths": _strengths_json(self.strengths),
            "active": self.active,
            "may_stop": self.may_stop,
            "ledger": self.ledger,
        }


def _strengths_json(value: Strengths | None) -> dict[str, Any] | None:
    if value is None:
        return None
    systems = {name: estimate.as_dict() for name, estimate in value.systems.items()}
    return {"systems": systems, "position": value.position.as_dict()}


def make_report(
    pairs: Mapping[str, Pair], answers: Sequence[Answer], ledger: Mapping[str, dict[str, Any]] | None = None
) -> SetReport:
    """Return the statistics of answers, which are in the order of their times.

    Raises ``UserError`` if several annotators answered and the package for alpha is missing.
    """
    answers = [answer for answer in answers if answer.pair in pairs]
    firsts = first_answers(answers)
    names = sorted({answer.annotator for answer in answers})
    chosen_left = [answer.preferred == answer.left for answer in firsts if answer.preferred is not None]
    return SetReport(
        pairs=len(pairs),
        answered=len({answer.pair for answer in answers}),
        verdicts=dict(Counter(answer.verdict for answer in firsts)),
        annotators={name: _describe_annotator(name, pairs, answers) for name in names},
        alpha=agreement(firsts),
        left=wilson(sum(chosen_left), len(chosen_left)),
        comparisons=compare(pairs, firsts),
        strengths=strengths(_games(pairs, firsts)),
        active=sum(answer.active for answer in firsts),
        ledger=dict(ledger or {}),
    )


def first_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Return each annotator's first answer to each pair, without hidden duplicates."""
    firsts: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        if not answer.repeat:
            firsts.setdefault((answer.annotator, answer.pair), answer)
    return list(firsts.values())


def _describe_annotator(name: str, pairs: Mapping[str, Pair], answers: Sequence[Answer]) -> Annotator:
    own_answers = [answer for answer in answers if answer.annotator == name]
    firsts = {answer.pair: answer for answer in first_answers(own_answers)}
    repeats = [answer for answer in own_answers if answer.repeat and answer.pair in firsts]
    same = sum(answer.label == firsts[answer.pair].label for answer in repeats)
    gold = [answer for answer in firsts.values() if pairs[answer.pair].gold is not None]
    right = sum(answer.label == pairs[answer.pair].gold for answer in gold)
    seconds = statistics.median(answer.seconds for answer in own_answers)
    return Annotator(len(own_answers), seconds, wilson(same, len(repeats)), wilson(right, len(gold)))


def agreement(firsts: Sequence[Answer], resamples: int = RESAMPLES, seed: int = 0) -> Estimate | None:
    """Return Krippendorff's ordinal alpha of the verdicts from -2 to 2, with a bootstrap interval over pairs.

    Ties and two bad answers are both 0. None if no pair has answers of two annotators, or all verdicts are equal, which
    leaves alpha undefined.
    """
    by_pair: dict[str, dict[str, int]] = {}
    for answer in firsts:
        by_pair.setdefault(answer.pair, {})[answer.annotator] = answer.value
    shared = [values for values in by_pair.values() if len(values) > 1]
    names = sorted({name for values in shared for name in values})
    if not shared:
        return None
    require_extra("krippendorff", "annotate", "Krippendorff's alpha")
    table = np.array([[values.get(name, np.nan) for values in shared] for name in names])
    value = _alpha(table)
    if value is None:
        return None
    generator = np.random.default_rng(seed)
    draws = [_alpha(table[:, generator.integers(0, len(shared), size=len(shared))]) for _ in range(resamples)]
    resampled = np.array([draw for draw in draws if draw is not None])
    if len(shared) < 2 or len(resampled) < resamples / 2:
        return Estimate(value, -np.inf, np.inf, len(shared), "bootstrap")
    low, high = percentiles(resampled, len(shared))
    return Estimate(value, low, min(1.0, high), len(shared), "bootstrap")


def _alpha(table: Any) -> float | None:
    """Return alpha of (annotators, pairs) with NaN for a missing answer; None if all verdicts are equal."""
    import krippendorff

    if len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


def compare(pairs: Mapping[str, Pair], firsts: Sequence[Answer], alpha: float = ALPHA) -> list[Comparison]:
    """Return a comparison of each two systems, and of annotators with each model that scored the pairs.

    A pair counts once, by its first answer. Gold questions and actively selected pairs do not count: the latter are not
    a sample of all pairs. ``alpha`` is divided by the number of comparisons.
    """
    outcomes: dict[str, list[float]] = {}
    for answer in _one_per_pair(pairs, firsts):
        pair = pairs[answer.pair]
        for name, a_counts in _contests(pair):
            value = 0.5 if answer.preferred is None else float((answer.preferred == "a") == a_counts)
            outcomes.setdefault(name, []).append(value)
    # The number of comparisons must not depend on the answers, or the interval would not be valid at every time.
    names = {name for pair in pairs.values() for name, _ in _contests(pair)}
    return [_decide(name, values, alpha / len(names)) for name, values in sorted(outcomes.items())]


def _one_per_pair(pairs: Mapping[str, Pair], firsts: Sequence[Answer]) -> list[Answer]:
    by_pair: dict[str, Answer] = {}
    for answer in firsts:
        if not answer.active and pairs[answer.pair].gold is None:
            by_pair.setdefault(answer.pair, answer)
    return list(by_pair.values())


def _contests(pair: Pair) -> list[tuple[str, bool]]:
    """Return the names of the comparisons that a pair counts for, and whether ``a`` is the side that can win."""
    contests = []
    if pair.systems is not None and pair.systems[0] != pair.systems[1]:
        first, second = sorted(pair.systems)
        contests.append((f"{first} better than {second}", pair.systems[0] == first))
    for model, (a, b) in pair.scores.items():
        if a != b:
            contests.append((f"annotators agree with {model}", a > b))
    return contests


def _decide(name: str, values: Sequence[float], alpha: float) -> Comparison:
    intervals = confidence_sequence(values, alpha)
    low = float(intervals.low[-1])
    high = float(intervals.high[-1])
    decision = "open"
    if low > 0.5 or high < 0.5:
        decision = "clear"
    elif high - 0.5 <= SAME and 0.5 - low <= SAME:
        decision = "same"
    ties = sum(value == 0.5 for value in values)
    return Comparison(name, statistics.fmean(values), low, high, len(values), ties, decision)


def _games(pairs: Mapping[str, Pair], firsts: Sequence[Answer]) -> list[Game]:
    """Return the comparisons of systems; also those of actively selected pairs, which Bradley-Terry can use."""
    games = []
    for answer in firsts:
        pair = pairs[answer.pair]
        if pair.systems is None or pair.systems[0] == pair.systems[1]:
            continue
        left_system, right_system = pair.systems if answer.left == "a" else pair.systems[::-1]
        result = 0.5 if answer.preferred is None else float(answer.preferred == answer.left)
        games.append(Game(left_system, right_system, result, answer.pair))
    return games


def report_lines(report: SetReport) -> list[str]:
    """Return the report as lines of text."""
    verdicts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(report.verdicts.items()))
    lines = [f"{report.answered} of {report.pairs} pairs answered" + (f" ({verdicts})" if verdicts else "")]
    for name, line in report.annotators.items():
        span = report.ledger.get(name, {})
        when = f", {span['first'][:10]} to {span['last'][:10]}" if span else ""
        lines.append(f"{name}: {line.answers} answers, median {line.seconds:.1f} s a pair{when}")
        lines.append(f"  same verdict on duplicates {_text(line.consistency)}, gold questions {_text(line.gold)}")
    alpha = "needs two annotators with different verdicts" if report.alpha is None else _text(report.alpha)
    lines.append(f"agreement (Krippendorff's ordinal alpha): {alpha}")
    lines.append(f"left side preferred: {_text(report.left)}")
    if report.strengths is not None:
        position = report.strengths.position
        strength_texts = [f"{name} {_text(value)}" for name, value in report.strengths.systems.items()]
        terms = itertools.chain(strength_texts, [f"left side {_text(position)}"])
        lines.append(f"Bradley-Terry, log odds: {'; '.join(terms)}")
    for comparison in report.comparisons:
        lines.append(
            f"{comparison.name}: {comparison.share:.3f} [{comparison.low:.3f}, {comparison.high:.3f}], "
            f"{comparison.n} pairs, {comparison.ties} undecided: {comparison.decision}"
        )
    if report.active:
        lines.append(f"{report.active} answers to actively selected pairs do not count for these comparisons")
    if report.comparisons:
        lines.append("every comparison is decided: you may stop" if report.may_stop else "not decided yet: continue")
    return lines


def _text(estimate: Estimate) -> str:
    if estimate.n == 0:
        return "none"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}] of {estimate.n}"
