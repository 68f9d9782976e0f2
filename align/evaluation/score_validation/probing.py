"""Scores of a reward for the answers of the probes. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from align.data.final_answers import AnswerText, split_thought
from align.data.rows import Row
from align.errors import UserError, shorten
from align.evaluation.score_validation.references import Probe
from align.scoring.functions import FunctionScorer, ScoreFailed
from align.scoring.score import Part
from align.scoring.scored import Scored
from align.verifiers.verdict import REASONS

REPEATED_BY_VERIFIERS = 8
"""References that verifiers score twice: each may be a program that runs."""
EMPTY = AnswerText.cut("", 0)
UNUSUAL = (" \n", "####", "The answer is", "\\boxed{", "1/0", "-", "²", "1,,2", "1.2.3", "...", "{", "[]", "$")
"""Answers that a policy samples early and a careless parser fails at."""


@dataclass(frozen=True)
class ProbeScores:
    """Scores of one reward, in the order of the probes. None if a probe lacks that answer, or it was not scored."""

    reference: list[float]
    empty: list[float]
    other: list[float | None]
    prompt: list[float | None]
    repeated: list[tuple[float, float]]
    """First and second score of answers that were scored twice."""
    reasons: list[str]
    """Reasons of a verifier for the references; empty texts without one."""
    wrong: list[float | None] = field(default_factory=list)
    """Highest score of the wrong answers in the reference's form."""
    hedged: list[float | None] = field(default_factory=list)
    """Lowest score of the lists of answers with the right answer among them, which has another place in each."""
    long: list[float | None] = field(default_factory=list)
    by_columns: list[tuple[float, float]] = field(default_factory=list)
    """Scores of references, and their scores if all columns but the prompt are another row's."""

    def of(self, index: int) -> list[float]:
        """Return all scores of a probe."""
        columns = (self.other, self.prompt, self.wrong, self.hedged, self.long)
        others = [scores[index] for scores in columns if scores]
        scores = [self.reference[index], self.empty[index], *others]
        return [score for score in scores if score is not None]


def score_probes(part: Part, probes: Sequence[Probe], place: str) -> ProbeScores:
    """Return a reward's scores for all answers of the probes.

    Raises ``UserError``, which begins with ``place``, for a function that fails at one kind of answer.
    """
    kind = part.scorer.kind
    others = [None if probe.other is None else probes[probe.other].reference for probe in probes]
    reference = _Answers(part, probes, [probe.reference for probe in probes], "a reference answer", place)
    empty = _Answers(part, probes, [EMPTY] * len(probes), "an empty answer", place)
    other = _Answers(part, probes, others, "another row's answer", place)
    prompt = _Answers(part, probes, [probe.prompt for probe in probes], "a copy of the prompt", place)
    first = reference.score()
    parts = [empty.score(), other.score(), prompt.score()]
    repeated: list[tuple[float, float]] = []
    if kind != "judge":  # its grades are cached
        again = [replace(answers, limit=REPEATED_BY_VERIFIERS) for answers in (reference, other)]
        if kind == "function":
            again = [reference, other]
        for answers, scores in zip(again, (first, parts[1]), strict=True):
            pairs = zip(scores, answers.score(), strict=False)
            repeated += [(score, second) for score, second in pairs if score is not None and second is not None]
    long = _Answers(part, probes, [probe.long for probe in probes], "a long wrong answer", place)
    reads_form = kind == "function"
    if kind == "function":
        _score_unusual(part, probes, place)
    return ProbeScores(
        wrong=_score_lists(part, probes, [probe.wrong for probe in probes], place, max) if reads_form else [],
        hedged=_score_lists(part, probes, [probe.hedged for probe in probes], place, min) if reads_form else [],
        long=long.score() if kind in ("function", "judge", "model") else [],
        by_columns=_score_foreign_columns(part, probes, first, place) if kind == "function" else [],
        reference=[_number(score) for score in first],
        empty=[_number(score) for score in parts[0]],
        other=parts[1],
        prompt=parts[2],
        repeated=repeated,
        reasons=[reference.reasons.get(index, "") for index in range(len(probes))],
    )


def _score_lists(
    part: Part,
    probes: Sequence[Probe],
    lists: Sequence[Sequence[AnswerText]],
    place: str,
    combine: Callable[[list[float]], float],
) -> list[float | None]:
    """Return ``combine`` of the scores of each probe's answers; None for a probe without any."""
    owners = [index for index, texts in enumerate(lists) for _ in texts]
    flat = [text for texts in lists for text in texts]
    answers = _Answers(part, [probes[index] for index in owners], flat, "a wrong answer", place)
    by_probe: dict[int, list[float]] = {}
    for index, score in zip(owners, answers.score(), strict=True):
        by_probe.setdefault(index, []).append(_number(score))
    return [combine(by_probe[index]) if index in by_probe else None for index in range(len(lists))]


def _score_foreign_columns(
    part: Part, probes: Sequence[Probe], references: Sequence[float | None], place: str
) -> list[tuple[float, float]]:
    """Return the references' scores with the row's columns, and with another row's columns behind the same prompt."""
    present = [index for index, probe in enumerate(probes) if probe.other is not None]
    foreign = [
        replace(probes[index], row=probes[other].row | {name: probes[index].row.get(name) for name in ("id", "prompt")})
        for index in present
        if (other := probes[index].other) is not None
    ]
    answers = _Answers(part, foreign, [probe.reference for probe in foreign], "another row's columns", place)
    scores = answers.score()
    return [(_number(references[index]), _number(score)) for index, score in zip(present, scores, strict=True)]


def _score_unusual(part: Part, probes: Sequence[Probe], place: str) -> None:
    """Score answers that parsers fail at. Raises ``UserError`` with the first that a function fails at."""
    for text in UNUSUAL:
        answers = [split_thought(text)] * min(len(probes), 2)
        _Answers(part, probes[:2], answers, f"the answer {excerpt(text)}", place).score()


@dataclass(frozen=True)
class _Answers:
    """Answers of one kind to the probes."""

    part: Part
    probes: Sequence[Probe]
    texts: Sequence[AnswerText | None]
    description: str
    place: str
    limit: int | None = None
    """Score only the first so many."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Reasons of a verifier, by probe, after ``score``."""

    def score(self) -> list[float | None]:
        """Return the scores; None for a probe without this answer."""
        present = [index for index, text in enumerate(self.texts) if text is not None][: self.limit]
        scores: list[float | None] = [None] * len(self.texts)
        if not present:
            return scores
        scored = self._guarded(
            [self.probes[index].row for index in present],
            [text for index in present if (text := self.texts[index]) is not None],
        )
        marks = [(reason, scored.metrics[reason]) for reason in REASONS if reason in scored.metrics]
        for place, index in enumerate(present):
            scores[index] = float(scored.total[place])
            self.reasons[index] = next((reason for reason, values in marks if values[place] == 1.0), "")
        return scores

    def _guarded(self, rows: Sequence[Row], texts: Sequence[AnswerText]) -> Scored:
        """Name the kind of answer in the exception of a function."""
        try:
            return self.part.scorer.score(rows, texts, [False] * len(texts))
        except (ScoreFailed, UserError) as error:
            if not isinstance(self.part.scorer, FunctionScorer):
                raise
            raise UserError(
                f"{self.place}: the score fails at {self.description}, before training: {str(error).rstrip('.')}. A "
                "policy samples such answers; return a low score for them. With `on_error`, a function of one response "
                "scores them itself; `score_validation: {rows: 0}` validates nothing."
            ) from error


def _number(score: float | None) -> float:
    assert score is not None, "every probe has a reference and an empty answer"
    return score


def excerpt(text: str) -> str:
    """Return the end of a text, where answers are, as one printable line."""
    tail = text.strip()[-60:]
    return shorten(repr(tail if len(tail) == len(text.strip()) else f"…{tail}"), 80)
