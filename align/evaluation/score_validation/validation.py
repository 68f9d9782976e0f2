"""Validates a score before a stage learns from it, and refuses a score that cannot teach the task. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.config.scores import RewardEntry, ScoreValidation
from align.data.rows import Row
from align.errors import UserError
from align.evaluation.score_validation.checks import MIN_ROWS, Check, Report, check_part, check_sum, check_verifier
from align.evaluation.score_validation.probing import ProbeScores, score_probes
from align.evaluation.score_validation.references import Probe, choose_probes, refuse_missing_reference, select_probes
from align.scoring.functions import FunctionScorer
from align.scoring.score import Part

SUM = "sum"
"""Name of the weighted sum in tables."""
COLUMNS = ("reference", "empty", "other", "prompt", "wrong", "hedged", "long", "twice", "answer_matters")
DESCRIPTIONS = {"model": "checkpoint", "judge": "judge, and judge_rows is 0"}
"""Reasons not to validate a reward, by its kind."""
TITLES = (
    *("reward", "rows", "reference best", "empty lower", "other lower", "prompt lower"),
    *("wrong lower", "hedged lower", "long not higher", "same twice", "varies"),
)
"""Titles of the table's columns."""


@dataclass(frozen=True)
class Validation:
    """Reports of the rewards of a score and of their sum."""

    reports: list[Report]
    settings: ScoreValidation
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False
    """True if all that has a weight was validated, so the last report is about the entire score."""

    def problems(self) -> list[str]:
        """Return the reasons to refuse the score; none for a floor of 0."""
        texts = [report.problem(self.settings.waive) for report in self.reports]
        return [text for text in texts if text is not None]

    def failing(self) -> list[str]:
        """Return the checks that refuse the score, after those that are waived, each once."""
        waived = self.settings.waive
        return list(dict.fromkeys((*waived, *(name for report in self.reports for name in report.failing(waived)))))

    def waiver(self) -> str:
        """Return the setting of a stage that accepts the score as it is."""
        return f"score_validation: {{waive: [{', '.join(self.failing())}]}}"

    def table(self) -> list[list[str]]:
        """Return the titles, and the cells of each report: its checks as passed/total."""
        rows = [list(TITLES)]
        for report in self.reports:
            checks: dict[str, Check] = {check.name: check for check in report.checks}
            cells = [report.name, str(len(report.probes))]
            for name in COLUMNS:
                check = checks.get(name)
                shown = check is not None and check.total > 0
                cells.append(f"{check.passed}/{check.total}" if check is not None and shown else "-")
            rows.append(cells)
        return rows

    def lines(self) -> list[str]:
        """Return the table as sentences, a line per report, and the notes."""
        texts: list[str] = []
        for _, *cells in self.table()[1:]:
            report = self.reports[len(texts)]
            shown = [f"{title} {cell}" for title, cell in zip(TITLES[2:], cells[1:], strict=True) if cell != "-"]
            means = ", ".join(f"{name} {mean:.3g}" for name, mean in report.means().items())
            texts.append(f"score of '{report.title}' on {cells[0]} rows: {', '.join(shown)} (means: {means})")
        return texts + self.all_notes()

    def all_notes(self) -> list[str]:
        """Return what was not validated, and why."""
        return [*self.notes, *(f"'{report.title}' {note}" for report in self.reports for note in report.notes)]

    def to_json(self) -> dict[str, Any]:
        """Return the reports as plain data, by name."""
        return {report.name: report.to_json() for report in self.reports}


def columns_of(score: str | list[RewardEntry] | None) -> list[str]:
    """Return the columns that the entries of a score compare with."""
    columns: list[str] = []
    for entry in score if isinstance(score, list) else ():
        values = []
        if entry.verifier is not None and entry.verifier != "regex":
            values.append(getattr(entry, entry.verifier))
        if entry.judge is not None:
            values.append(entry.judge.reference)
        columns += [value for value in values if isinstance(value, str)]
    return columns


def check_references(parts: Sequence[Part], rows: Sequence[Row]) -> None:
    """Read the references of all rows. Raises ``UserError`` for a reference that a verifier cannot use."""
    for part in parts:
        part.scorer.check_references(rows)


def validate_parts(
    parts: Sequence[Part],
    rows: Sequence[Row],
    settings: ScoreValidation,
    *,
    place: str = "score",
    columns: Sequence[str] = (),
    decides_sum: bool = True,
    with_models: bool = False,
) -> Validation:
    """Return how the rewards and their sum score references, and answers that must score less.

    Args:
        parts: Rewards with their weights. A weight of 0 has no effect, so such a reward is only shown.
        rows: Rows to draw the sample from.
        settings: Size of the sample, floor, and column of the reference.
        place: Beginning of messages.
        columns: Columns that the rewards compare with (``columns_of``).
        decides_sum: False if something else is also added to the score.
        with_models: True to also validate reward models.

    Raises:
        UserError: No row has the column of the reference, or a function raises an exception.
    """
    if not settings.rows or not parts:
        return Validation([], settings)
    refuse_missing_reference(rows, settings.reference, f"{place}: score_validation.reference")
    probes = choose_probes(rows, settings, columns)
    if not probes:
        note = "the score was not validated, because no row has a reference answer"
        return Validation([], settings, [f"{note}; score_validation.reference names a column"])
    judged = probes
    if settings.judge_rows < len(probes):
        judged = select_probes(probes, settings.judge_rows, columns)
    return _Validator(probes, judged, settings, place).validate(parts, decides_sum, with_models)


def refuse_problems(validation: Validation, place: str) -> None:
    """Raise ``UserError``, which begins with ``place``, for a score that fails a check."""
    problems = validation.problems()
    if not problems:
        return
    listed = "\n".join(f"  {text}." for text in problems)
    floor = validation.settings.floor
    raise UserError(
        f"{place}: the score cannot teach the task; fewer than {floor:.0%} of the rows pass a check:\n{listed}\n"
        "Correct it and repeat the check with `align score DATA --with SPEC --validate` (docs/rewards.md). If the "
        f"references are not meant to score best, name others (`score_validation: {{reference: COLUMN}}`). If the "
        f"score is meant so, start with `{validation.waiver()}`."
    )


@dataclass(frozen=True)
class _Scored:
    """A reward and its scores."""

    part: Part
    probes: list[Probe]
    scores: ProbeScores


@dataclass(frozen=True)
class _Validator:
    """Validates rewards on the same probes, and judges on a few of them."""

    probes: list[Probe]
    judged: list[Probe]
    settings: ScoreValidation
    place: str

    def validate(self, parts: Sequence[Part], decides_sum: bool, with_models: bool) -> Validation:
        """Score the probes and check the scores."""
        scored: list[_Scored] = []
        notes: list[str] = []
        is_complete = decides_sum
        for part in parts:
            kind = part.scorer.kind
            probes = self.judged if kind == "judge" else self.probes
            if probes and (kind != "model" or with_models):
                scored.append(_Scored(part, probes, score_probes(part, probes, self.place)))
                continue
            is_complete = is_complete and part.weight == 0
            notes.append(f"'{part.name}' was not validated, because it is a {DESCRIPTIONS[kind]}")
        effective = [item for item in scored if item.part.weight != 0]
        is_single = is_complete and len(effective) == 1
        reports = [self._report(item, is_single) for item in scored]
        if is_complete and len(effective) > 1:
            reports.append(self._report_sum(effective))
        if len(self.probes) < MIN_ROWS:
            notes.append(f"only {len(self.probes)} rows have a reference answer, which is too few to refuse a score")
        return Validation(reports, self.settings, notes, is_complete and bool(effective))

    def _report(self, item: _Scored, is_single: bool) -> Report:
        """Report one reward. A weight of 0 has no effect, so it is not refused."""
        part = item.part
        kind = item.part.scorer.kind
        floor = self.settings.floor if part.weight else 0.0
        if kind == "verifier" and part.weight >= 0:
            return check_verifier(part.name, item.probes, item.scores, floor)
        # A reference may lack the form, so references are not compared.
        if is_single and part.weight and kind != "format":
            # The sign of the weight decides what the policy learns.
            report = check_sum(part.name, kind, item.probes, _weighted([item]), floor, self.settings.waive)
        else:
            report = check_part(part.name, kind, item.probes, item.scores, floor)
        return replace(report, label=_label(part))

    def _report_sum(self, items: Sequence[_Scored]) -> Report:
        """Report the weighted sum, on the rows that all its rewards have scored."""
        kinds = {item.part.scorer.kind for item in items}
        kind = next((kind for kind in ("judge", "model") if kind in kinds), SUM)
        probes = self.probes
        if "judge" in kinds and self.judged is not self.probes:
            # Judges score fewer rows, so the other rewards are scored again on the same rows.
            probes = self.judged
            items = [
                item if item.probes is probes else _Scored(item.part, probes, self._score_judged(item))
                for item in items
            ]
        return check_sum(SUM, kind, probes, _weighted(items), self.settings.floor, self.settings.waive)

    def _score_judged(self, item: _Scored) -> ProbeScores:
        return score_probes(item.part, self.judged, self.place)


def _label(part: Part) -> str:
    """Return a function's path if its reward has no other name than 'function'."""
    return part.scorer.path if part.name == "function" and isinstance(part.scorer, FunctionScorer) else ""


def _weighted(items: Sequence[_Scored]) -> ProbeScores:
    """Return the weighted sum of scores of the same probes."""

    def add(name: str) -> list[float | None]:
        columns = zip(*(item.scores.answers[name] for item in items), strict=True)
        return [_weigh(items, [score for score in scores if score is not None]) for scores in columns]

    names = [name for name in items[0].scores.answers if all(name in item.scores.answers for item in items)]
    # Each reward of several is compared with itself, and only a single function is called with another row's columns.
    single = items[0].scores if len(items) == 1 else ProbeScores({}, [], [])
    reasons = ["; ".join(filter(None, reasons)) for reasons in zip(*(i.scores.reasons for i in items), strict=True)]
    return ProbeScores({name: add(name) for name in names}, single.repeated, reasons, single.by_columns)


def _weigh(items: Sequence[_Scored], scores: Sequence[float]) -> float | None:
    """Return the weighted sum of a score of each reward; None if a reward has none."""
    if len(scores) < len(items):
        return None
    return sum(item.part.weight * score for item, score in zip(items, scores, strict=True))
