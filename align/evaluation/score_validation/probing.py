"""Scores of a reward for the answers of the probes. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from align.data.final_answers import AnswerText
from align.data.scoring import FunctionScorer, Part, Parts, ScoreFailed, parts_of
from align.errors import UserError, shorten
from align.evaluation.score_validation.references import Probe
from align.judges.scorer import JudgeScorer
from align.verifiers.scorer import VerifierScorer
from align.verifiers.verdict import REASONS

PartKind = Literal["verifier", "format", "function", "judge", "model"]
COMPARING = frozenset({"math", "number", "choice", "exact", "contains", "code"})
"""Verifiers by which a right answer scores 1 and any other 0. The others check a form, which a reference may lack."""
REPEATED_BY_VERIFIERS = 8
"""References that verifiers score twice: each may be a program that runs."""
EMPTY = AnswerText.cut("", 0)


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

    def of(self, index: int) -> list[float]:
        """Return all scores of a probe."""
        scores = [self.reference[index], self.empty[index], self.other[index], self.prompt[index]]
        return [score for score in scores if score is not None]


def kind_of(part: Part) -> PartKind:
    """Return the kind of a reward, which decides the checks that apply to it."""
    scorer = part.scorer
    if isinstance(scorer, VerifierScorer):
        return "verifier" if scorer.path in COMPARING else "format"
    if isinstance(scorer, JudgeScorer):
        return "judge" if getattr(scorer.config, "model", None) is None else "model"
    return "function" if isinstance(scorer, FunctionScorer) else "model"


def score_probes(part: Part, probes: Sequence[Probe], place: str) -> ProbeScores:
    """Return a reward's scores for all answers of the probes.

    Raises ``UserError``, which begins with ``place``, for a function that fails at one kind of answer.
    """
    kind = kind_of(part)
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
            pairs = zip(scores[""], answers.score()[""], strict=False)
            repeated += [(score, second) for score, second in pairs if score is not None and second is not None]
    return ProbeScores(
        reference=[_number(score) for score in first[""]],
        empty=[_number(score) for score in parts[0][""]],
        other=parts[1][""],
        prompt=parts[2][""],
        repeated=repeated,
        reasons=[_reason(first, index) for index in range(len(probes))],
    )


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

    def score(self) -> dict[str, list[float | None]]:
        """Return the scores under ``""`` and metrics by name; None for a probe without this answer."""
        present = [index for index, text in enumerate(self.texts) if text is not None][: self.limit]
        rows = [self.probes[index].row for index in present]
        texts = [text for index in present if (text := self.texts[index]) is not None]
        parts = self._guarded(lambda: parts_of(self.part.scorer, rows, texts, [False] * len(texts))) if rows else {}
        scores: dict[str, list[float | None]] = {name: [None] * len(self.texts) for name in ("", *parts)}
        for name, values in parts.items():
            for index, value in zip(present, values, strict=True):
                scores[name][index] = float(value)
        return scores

    def _guarded(self, score: Callable[[], Parts]) -> Parts:
        """Name the kind of answer in the exception of a function."""
        try:
            return score()
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


def _reason(parts: dict[str, list[float | None]], index: int) -> str:
    return next((name for name in REASONS if name in parts and parts[name][index] == 1.0), "")


def excerpt(text: str) -> str:
    """Return the end of a text, where answers are, as one printable line."""
    tail = text.strip()[-60:]
    return shorten(repr(tail if len(tail) == len(text.strip()) else f"…{tail}"), 80)
