"""Checks of a score on answers whose order is known: the reference, an empty answer, another row's, and the prompt.

Torch-free. The checks that apply depend on the kind of the reward:

- A verifier gives references 1 and all other answers 0.
- A sum of rewards gives each row's reference more than the row's other answers. A sum that does not depend on the row,
  such as a reward for a style, only has to vary, and not to be highest for an empty answer.
- Judges and reward models, and better answers of pairs as references, may be wrong in up to half of the rows. They may
  also give another row's answer as much.
- A function gives the same answer the same score twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.scores import CheckName
from align.evaluation.score_validation.probing import FORMED, PLAIN, ProbeScores, excerpt
from align.evaluation.score_validation.references import FORMS, Probe

Compare = Callable[[float, float], bool]
"""Comparison of the reference's score with another answer's: True if the order is right."""
LENIENT_FLOOR = 0.5
"""Highest floor of checks that a correct score may fail in some rows: another row's answer may be right, too."""
MIN_ROWS = 4
"""Rows below which a share has no meaning, so no score is refused."""
TOLERANCE = 1e-6
CAUSES: dict[CheckName, str] = {
    "twice": "gives the same answer another score the second time. Remove its randomness, or set its temperature to 0",
    "answer_matters": "gives all answers to a row the same score, the reference included. Check the column that it "
    "compares with, and that it reads the answer",
    "row": "reads neither the row's answer nor its prompt, though the rows have right answers. Compare the response "
    "with the row's answer",
    "reference": "does not give references its maximum. Check the column that it compares with, and how it reads the "
    "answer",
    "empty": "gives an empty answer as much as the reference. A policy would learn to say nothing",
    "other": "gives another row's answer as much as the row's own. Check that it reads the row",
    "prompt": "gives a copy of the prompt as much as the reference. A policy would learn to repeat the prompt",
    "wrong": "gives a wrong answer in the reference's form as much as the reference. Check that it compares the entire "
    "answer",
    "hedged": "gives a list of answers as much as the reference, wherever the right answer is in the list. A policy "
    "would learn to guess often",
    "long": "gives a long wrong answer more than the reference. A policy would learn to write much",
}
"""Descriptions of failures, for messages. An earlier failure is often the cause of a later failure."""


@dataclass(frozen=True)
class Check:
    """Rows that passed a check, of those that it applied to."""

    name: CheckName
    results: list[bool | None]
    """Result for each probe; None if the check does not apply to it."""
    floor: float | None
    """Share that must pass; None for a check that is only shown."""

    @property
    def passed(self) -> int:
        """Number of probes that passed."""
        return sum(result is True for result in self.results)

    @property
    def total(self) -> int:
        """Number of probes that the check applied to."""
        return sum(result is not None for result in self.results)

    @property
    def fails(self) -> bool:
        """True if too few rows passed."""
        return self.floor is not None and self.total > 0 and self.passed < self.floor * self.total - TOLERANCE

    def failing_form(self, probes: Sequence[Probe]) -> str | None:
        """Return the first form of answer with at least ``MIN_ROWS`` rows of which fewer than half passed."""
        # If nearly all references fail, the form is not the cause.
        if self.name != "reference" or not self.floor or self.passed < LENIENT_FLOOR * self.total:
            return None
        for form in FORMS:
            of_form = [result for result, probe in zip(self.results, probes, strict=True) if form in probe.forms]
            results = [result for result in of_form if result is not None]
            if len(results) >= MIN_ROWS and sum(results) < LENIENT_FLOOR * len(results):
                return form
        return None


@dataclass(frozen=True)
class Report:
    """Checks of one reward, or of the sum."""

    name: str
    kind: str
    probes: Sequence[Probe]
    scores: ProbeScores
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    label: str = ""
    """Name in messages, such as a function's, if it is not the reward's name."""

    @property
    def title(self) -> str:
        """Name in messages."""
        return self.label or self.name

    def means(self) -> dict[str, float]:
        """Return the mean score of each kind of answer."""
        present = {
            name: [score for score in scores if score is not None] for name, scores in self.scores.answers.items()
        }
        return {name: statistics.fmean(scores) for name, scores in present.items() if scores}

    def failing(self, waived: Sequence[CheckName]) -> list[CheckName]:
        """Return the names of the checks that fail, without waived checks."""
        failing = [check for check in self.checks if check.fails or check.failing_form(self.probes) is not None]
        return [check.name for check in failing if check.name not in waived]

    def problem(self, waived: Sequence[CheckName] = ()) -> str | None:
        """Return a sentence with an example for the first check that fails and is not waived; None if none does."""
        checks = {check.name: check for check in self.checks if check.name not in waived}
        for name in CAUSES:
            check = checks.get(name)
            if check is None:
                continue
            form = check.failing_form(self.probes)
            if form is not None:
                return self._describe(check, f"for most answers with {form}", form)
            if check.fails:
                return self._describe(check, f"in {check.total - check.passed} of {check.total} rows", None)
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the shares as plain data."""
        checks = {check.name: {"passed": check.passed, "total": check.total} for check in self.checks}
        return {"kind": self.kind, "rows": len(self.probes), "means": self.means(), "checks": checks}

    def _describe(self, check: Check, rows: str, form: str | None) -> str:
        failed = [index for index, result in enumerate(check.results) if result is False]
        if form is not None:
            failed = [index for index in failed if form in self.probes[index].forms]
        text = f"'{self.title}' {CAUSES[check.name]} ({rows})"
        if check.name == "twice":
            first, second = self.scores.repeated[failed[0]]
            return f"{text}. An answer scored {first:g}, then {second:g}"
        return f"{text}. {self._example(failed[0])}"

    def _example(self, index: int) -> str:
        probe = self.probes[index]
        scores = self.scores
        reason = f" ({scores.reasons[index]})" if scores.reasons[index] else ""
        numbers = [f"the reference {excerpt(probe.reference)} scores {scores.reference[index]:g}{reason}"]
        for name, description in (PLAIN | FORMED).items():
            score = scores.answers[name][index] if name in scores.answers else None
            if name != "reference" and score is not None:
                numbers.append(f"{description} {score:g}")
        return f"Row {excerpt(str(probe.row.get('id', index)))}: {', '.join(numbers)}"


def check_verifier(name: str, probes: Sequence[Probe], scores: ProbeScores, floor: float) -> Report:
    """Check that a verifier gives references 1, and other answers 0."""
    lenient = min(floor, LENIENT_FLOOR)
    # A chosen answer is better than the rejected one, but it may still be wrong.
    reference_floor = lenient if _are_chosen(probes) else floor
    checks = [
        Check("reference", [score >= 1.0 - TOLERANCE for score in scores.reference], reference_floor),
        Check("empty", _compare(scores, "empty", _is_zero), floor),
        Check("other", _compare(scores, "other", _is_zero), lenient),
        Check("prompt", _compare(scores, "prompt", _is_zero), lenient),
        _twice(scores, floor),
    ]
    return Report(name, "verifier", probes, scores, _decisive(checks, len(probes)))


def check_part(name: str, kind: str, probes: Sequence[Probe], scores: ProbeScores, floor: float) -> Report:
    """Check one of several rewards that has no maximum: only its determinism decides, the sum decides the rest.

    A judge must also tell answers apart.
    """
    floors: dict[CheckName, float | None] = {"twice": floor}
    if kind == "judge":
        floors["answer_matters"] = min(floor, LENIENT_FLOOR)
    checks = [_with_floor(check, floors.get(check.name)) for check in _relative_checks(scores, floor, floor, _is_lower)]
    return Report(name, kind, probes, scores, _decisive(checks, len(probes)))


def check_sum(
    name: str, kind: str, probes: Sequence[Probe], scores: ProbeScores, floor: float, waived: Sequence[CheckName] = ()
) -> Report:
    """Check that the score gives each row's reference more than the other answers.

    A score that compares with no reference, such as a style, has no right answer. It is refused if the rows have right
    answers and it reads no row, unless ``row`` is waived.
    """
    lenient = min(floor, LENIENT_FLOOR)
    is_lenient = kind in ("judge", "model") or _are_chosen(probes)
    compare = _is_not_higher if is_lenient else _is_lower
    checks = _relative_checks(scores, lenient if is_lenient else floor, lenient, compare)
    ignores_row = is_row_independent(probes, scores)
    has_answers = sum(probe.answer is not None for probe in probes) > len(probes) / 2
    reads_reference = any(not _are_equal(*pair) for pair in scores.by_columns)
    is_function = bool(scores.by_columns)
    if ignores_row and has_answers and kind not in ("judge", "model") and "row" not in waived:
        # The other checks would only repeat the cause.
        checks = [*(_with_floor(check, None) for check in checks), Check("row", [False for _ in probes], floor)]
        return Report(name, kind, probes, scores, _decisive(checks, len(probes)))
    if not ignores_row and (has_answers or reads_reference or not is_function):
        return Report(name, kind, probes, scores, _decisive(checks, len(probes)))
    # No right answer is known to the score, so only its repetition and its variation are certain. A judge must still
    # not be led by length.
    deciding = ("twice", "answer_matters", "empty", "long") if kind == "judge" else ("twice", "answer_matters")
    checks = [check if check.name in deciding else _with_floor(check, None) for check in checks]
    subject = "does not depend on the row" if ignores_row else "compares with no reference"
    note = f"{subject}, so references are not compared with other answers"
    return Report(name, kind, probes, scores, _decisive(checks, len(probes)), [note])


def is_row_independent(probes: Sequence[Probe], scores: ProbeScores) -> bool:
    """Return True if each text has the same score as an answer to two rows, and some texts differ in their scores."""
    pairs = []
    references = scores.reference
    for probe, score in zip(probes, scores.answers["other"], strict=True):
        if probe.other is not None and score is not None:
            # The same text was scored as an answer to this row and to the row that it belongs to.
            pairs.append((score, references[probe.other]))
    is_equal = all(_are_equal(*pair) for pair in pairs)
    all_scores = [score for index in range(len(probes)) for score in scores.of(index, ("reference", "empty"))]
    return len(pairs) >= MIN_ROWS and is_equal and _differ(all_scores)


def _relative_checks(scores: ProbeScores, floor: float, lenient: float, compare: Compare) -> list[Check]:
    """Return the checks of a score without a known maximum: the reference is the row's highest, the others are lower.

    ``compare`` compares another row's answer, and the prompt, with the reference.
    """
    indices = range(len(scores.reference))
    # The checks of wrong, hedged and long answers have causes of their own.
    highest = [_is_highest(scores.of(index, PLAIN)) for index in indices]
    matters = [_differ(scores.of(index)) for index in indices]
    return [
        Check("reference", list(highest), floor),
        Check("empty", _compare(scores, "empty", _is_lower), floor),
        Check("other", _compare(scores, "other", compare), lenient),
        Check("prompt", _compare(scores, "prompt", compare), lenient),
        Check("wrong", _compare(scores, "wrong", _is_lower), lenient),
        Check("hedged", _compare(scores, "hedged", _is_lower), lenient),
        Check("long", _compare(scores, "long", _is_not_higher), lenient),
        _twice(scores, floor),
        Check("answer_matters", list(matters), lenient),
    ]


def _decisive(checks: list[Check], rows: int) -> list[Check]:
    """Return the checks, without floors if there are too few rows."""
    if rows >= MIN_ROWS:
        return checks
    return [check if check.name == "twice" else _with_floor(check, None) for check in checks]


def _with_floor(check: Check, floor: float | None) -> Check:
    return Check(check.name, check.results, floor)


def _twice(scores: ProbeScores, floor: float) -> Check:
    return Check("twice", [_are_equal(first, second) for first, second in scores.repeated], floor)


def _compare(scores: ProbeScores, name: str, is_passed: Compare) -> list[bool | None]:
    """Return the result for each score of an answer, given the reference's; None for an answer that a probe lacks."""
    pairs = zip(scores.reference, scores.answers.get(name, ()), strict=False)
    return [None if score is None else is_passed(reference, score) for reference, score in pairs]


def _is_highest(scores: Sequence[float]) -> bool:
    """Return True if the first score, the reference's, is the highest and not the only one."""
    return scores[0] >= max(scores) - TOLERANCE and _differ(scores)


def _is_zero(_: float, score: float) -> bool:
    return score <= TOLERANCE


def _is_lower(reference: float, score: float) -> bool:
    return score < reference - TOLERANCE * max(1.0, abs(reference))


def _is_not_higher(reference: float, score: float) -> bool:
    return not _is_lower(score, reference)


def _differ(scores: Sequence[float]) -> bool:
    return not _are_equal(max(scores), min(scores))


def _are_equal(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _are_chosen(probes: Sequence[Probe]) -> bool:
    """Return True if most references are only the better answers of pairs."""
    return sum(probe.is_chosen for probe in probes) > len(probes) / 2
