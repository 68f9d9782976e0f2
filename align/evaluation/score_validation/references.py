"""Reference answers of rows, and the answers that a score is probed with: none, another row's, and the prompt itself.

Torch-free.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.config.scores import ScoreValidation
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import Row
from align.errors import UserError
from align.verifiers.verdict import reference_value

MAX_SCANNED = 50_000
"""Rows among which the sample is drawn."""
ROWS_PER_FORM = 6
"""Rows of each form of answer in the sample: a parser often fails at a form that few rows have."""
MAX_ANSWER = 60
"""Characters of a right answer that is replaced in a reference."""
FILLER = "Let us think about this question carefully, step by step, and consider all that matters here. " * 16
FORMS: Mapping[str, re.Pattern[str]] = {
    "a thousands separator": re.compile(r"\d,\d{3}(?!\d)"),
    "a decimal point": re.compile(r"\d\.\d"),
    "a negative number": re.compile(r"(?<![\w)])-\s*[$]?\d"),
    "a fraction": re.compile(r"\d\s*/\s*\d|\\d?frac\b"),
    "a percent sign": re.compile(r"\d\s*\\?%"),
    "a currency": re.compile(r"[$€£]\s*\d"),
    "LaTeX": re.compile(r"\\[a-zA-Z]+"),
    "other letters than ASCII": re.compile(r"[^\x00-\x7f]"),
}
"""Forms of a reference's last line, by the name in messages."""


@dataclass(frozen=True)
class Probe:
    """A row, with answers to it whose scores are compared."""

    row: Row
    reference: AnswerText
    is_chosen: bool
    """True if the reference is only the better answer of a pair, which may be wrong."""
    forms: tuple[str, ...]
    """Forms of the reference, of ``FORMS``."""
    other: int | None = None
    """Index of the probe whose reference is the other answer; None if all other references may be right, too."""
    prompt: AnswerText | None = None
    """Copy of the prompt's last message; None if it is the reference."""
    answer: str | None = None
    """The row's right answer, if a column has it; None if the row only has an example of a response."""
    wrong: tuple[AnswerText, ...] = ()
    """The reference with another answer in place of the right answer."""
    hedged: tuple[AnswerText, ...] = ()
    """The reference with a list of answers in place of the right answer, which has another place in each list."""
    long: AnswerText | None = None
    """Another row's answer behind many sentences without content."""


def reference_of(row: Row, column: str | None = None) -> str | None:
    """Return a row's reference answer; None without one.

    It is the row's ``column`` if one is named. Otherwise it is its completion, its column ``answer``, the ``answer`` in
    its ``checks``, or its better answer. A completion that is labeled as bad or was cut off is no reference.
    """
    if column is not None:
        return _text(_optional_value(row, column))
    if row.get("label") is not False and row.get("completion_finished") is not False:
        completion = _last_message(row.get("completion"))
        if completion is not None:
            return completion
    for name in ("answer", "checks.answer"):
        answer = _text(_optional_value(row, name))
        if answer is not None:
            return answer
    return _last_message(row.get("chosen"))


def choose_probes(rows: Sequence[Row], settings: ScoreValidation, columns: Sequence[str] = ()) -> list[Probe]:
    """Return probes of a sample of the rows that have a reference.

    Args:
        rows: Rows that a stage learns from.
        settings: Number of rows, and the column of the reference.
        columns: Columns that the score compares with. Rows with equal values are not each other's wrong answer.
    """
    referenced = []
    for row in itertools.islice(rows, MAX_SCANNED):
        reference = reference_of(row, settings.reference)
        if reference is not None:
            referenced.append(_probe(row, split_thought(reference), settings))
    chosen = _spread(referenced, settings.rows)
    identities = {id(probe) for probe in chosen}
    # The sample may have few rows of a rare form, so further rows of that form are added.
    for form in FORMS:
        needed = ROWS_PER_FORM - sum(form in probe.forms for probe in chosen)
        for probe in referenced:
            if needed > 0 and form in probe.forms and id(probe) not in identities:
                chosen.append(probe)
                identities.add(id(probe))
                needed -= 1
    return [_with_other(chosen, index, columns) for index in range(len(chosen))]


def select_probes(probes: Sequence[Probe], count: int, columns: Sequence[str] = ()) -> list[Probe]:
    """Return at most ``count`` of the probes at equal distances, whose other answers are each other's references."""
    chosen = _spread(probes, count)
    return [_with_other(chosen, index, columns) for index in range(len(chosen))]


def refuse_missing_reference(rows: Sequence[Row], column: str | None, place: str) -> None:
    """Raise ``UserError``, which begins with ``place``, if no row has the column that is named as the reference."""
    if column is not None and rows and all(reference_of(row, column) is None for row in rows[:MAX_SCANNED]):
        reference_value(rows[0], column, place)


def _probe(row: Row, reference: AnswerText, settings: ScoreValidation) -> Probe:
    lines = [line for line in reference.splitlines() if line.strip()]
    last_line = lines[-1] if lines else ""
    forms = tuple(name for name, pattern in FORMS.items() if pattern.search(last_line))
    prompt = _last_message(row.get("prompt"))
    if prompt is not None and prompt.strip() == reference.strip():
        prompt = None
    without_pair = {name: value for name, value in row.items() if name != "chosen"}
    is_chosen = settings.reference is None and reference_of(without_pair) is None
    copied = None if prompt is None else split_thought(prompt)
    return Probe(row, reference, is_chosen, forms, prompt=copied, answer=_right_answer(row, settings.reference))


def _right_answer(row: Row, column: str | None) -> str | None:
    """Return what a column of the row gives as its right answer."""
    names = ("answer", "checks.answer") if column is None else (column,)
    return next((answer for name in names if (answer := _text(_optional_value(row, name))) is not None), None)


def _with_other(probes: Sequence[Probe], index: int, columns: Sequence[str]) -> Probe:
    """Return a probe with the nearest later probe as the other answer whose reference cannot be right for it."""
    probe = probes[index]
    for distance in range(1, len(probes)):
        other = (index + distance) % len(probes)
        if _differ(probe, probes[other], columns):
            return _with_wrong_answers(replace(probe, other=other), probes)
    return replace(probe, other=None)


def _with_wrong_answers(probe: Probe, probes: Sequence[Probe]) -> Probe:
    """Return a probe with wrong answers in the form of its reference, as far as its right answer is known."""
    assert probe.other is not None
    long = split_thought(f"{FILLER}\n{probes[probe.other].reference}")
    span = _answer_span(probe)
    if span is None or probe.answer is None:
        return replace(probe, long=long)
    answer = probe.reference[slice(*span)]
    others = [other.answer.strip() for other in (*probes[probe.other :], *probes[: probe.other]) if other.answer]
    others = [other for other in dict.fromkeys(others) if not _overlap(other, answer) and len(other) <= MAX_ANSWER][:2]
    if not others:
        return replace(probe, long=long)

    def write(text: str) -> AnswerText:
        return split_thought(probe.reference[: span[0]] + text + probe.reference[span[1] :])

    # A right number is also part of a longer number.
    wrong = [others[0], f"{answer}7"] if answer.isdecimal() else others[:1]
    hedged = [" or ".join((*others[:place], answer, *others[place:])) for place in range(len(others) + 1)]
    return replace(probe, long=long, wrong=tuple(map(write, wrong)), hedged=tuple(map(write, hedged)))


def _answer_span(probe: Probe) -> tuple[int, int] | None:
    """Return where the right answer is in the reference for the last time, alone or with thousands separators."""
    answer = (probe.answer or "").strip()
    if not answer or len(answer) > MAX_ANSWER or "\n" in answer:
        return None
    forms = [answer, *([f"{int(answer):,}"] if re.fullmatch(r"-?[0-9]{4,40}", answer) else [])]
    pattern = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    spans = [match.span() for match in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", probe.reference)]
    return spans[-1] if spans else None


def _overlap(first: str, second: str) -> bool:
    """Return True if one answer is part of the other, so a list of both may be right in full."""
    shorter, longer = sorted((first.casefold(), second.casefold().replace(",", "")), key=len)
    return shorter in longer


def _differ(probe: Probe, other: Probe, columns: Sequence[str]) -> bool:
    """Return True for two rows with different references, and different values in all columns that may decide."""
    if probe.reference.strip() == other.reference.strip():
        return False
    for name in dict.fromkeys(("checks", "answer", *columns)):
        value = _optional_value(probe.row, name)
        if value is not None and value == _optional_value(other.row, name):
            return False
    return True


def _spread(probes: Sequence[Probe], count: int) -> list[Probe]:
    """Return at most ``count`` probes at equal distances."""
    count = min(count, len(probes))
    return [probes[index * len(probes) // count] for index in range(count)]


def _last_message(messages: Any) -> str | None:
    if not messages or not isinstance(messages, Sequence) or isinstance(messages, str):
        return None
    return _text(messages[-1].get("content"))


def _optional_value(row: Row, column: str) -> Any:
    try:
        return reference_value(row, column, "")
    except UserError:
        return None


def _text(value: Any) -> str | None:
    return None if value is None or not str(value).strip() else str(value)
