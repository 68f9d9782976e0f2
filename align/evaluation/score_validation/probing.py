"""Scores of a reward for the answers of the probes. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from align.data.final_answers import AnswerText, split_thought
from align.errors import UserError, shorten
from align.evaluation.score_validation.references import Probe
from align.scoring.functions import ScoreFailed
from align.scoring.score import Part
from align.verifiers.verdict import REASONS

REPEATED_BY_VERIFIERS = 8
"""References that verifiers score twice: each may be a program that runs."""
EMPTY = AnswerText.cut("", 0)
UNUSUAL = (" \n", "####", "The answer is", "\\boxed{", "1/0", "-", "²", "1,,2", "1.2.3", "...", "{", "[]", "$")
"""Answers that a policy samples early and a careless parser fails at."""


PLAIN = {
    "reference": "a reference answer",
    "empty": "an empty answer",
    "other": "another row's answer",
    "prompt": "a copy of the prompt",
}
"""Answers that every reward scores, and their descriptions."""
FORMED = {"wrong": "a wrong answer", "hedged": "a list of answers", "long": "a long answer"}
"""Further answers: wrong ones in the reference's form, of which the highest score counts; the reference with a list of
answers that has the right answer in another place each time, of which the lowest score counts; and long wrong ones."""


@dataclass(frozen=True)
class ProbeScores:
    """Scores of one reward, in the order of the probes."""

    answers: dict[str, list[float | None]]
    """Scores by answer, of ``PLAIN`` and ``FORMED``; None if a probe lacks that answer, or it was not scored."""
    repeated: list[tuple[float, float]]
    """First and second score of answers that were scored twice."""
    reasons: list[str]
    """Reasons of a verifier for the references; empty texts without one."""
    by_columns: list[tuple[float, float]] = field(default_factory=list)
    """Scores of references, and their scores if all columns but the prompt are another row's."""

    @property
    def reference(self) -> list[float]:
        """Scores of the references, which every probe has."""
        return [_number(score) for score in self.answers["reference"]]

    def of(self, index: int, names: Collection[str] = (*PLAIN, *FORMED)) -> list[float]:
        """Return all scores of a probe, the reference's first."""
        scores = [values[index] for name, values in self.answers.items() if name in names]
        return [score for score in scores if score is not None]


def score_probes(part: Part, probes: Sequence[Probe], place: str) -> ProbeScores:
    """Return a reward's scores for all answers of the probes.

    Raises ``UserError``, which begins with ``place``, for a function that fails at one kind of answer.
    """
    kind = part.scorer.kind
    prober = _Prober(part, place)
    texts: dict[str, Sequence[AnswerText | None]] = {
        "reference": [probe.reference for probe in probes],
        "empty": [EMPTY] * len(probes),
        "other": [None if probe.other is None else probes[probe.other].reference for probe in probes],
        "prompt": [probe.prompt for probe in probes],
    }
    scored = {name: prober.score(probes, texts[name], description) for name, description in PLAIN.items()}
    answers = {name: scores for name, (scores, _) in scored.items()}
    repeated: list[tuple[float, float]] = []
    for name in ("reference", "other") if kind != "judge" else ():  # a judge's grades are cached
        limit = None if kind == "function" else REPEATED_BY_VERIFIERS
        again, _ = prober.score(probes, texts[name], PLAIN[name], limit)
        pairs = zip(answers[name], again, strict=True)
        repeated += [(score, second) for score, second in pairs if score is not None and second is not None]
    by_columns: list[tuple[float, float]] = []
    if kind == "function":
        for text in UNUSUAL:
            some = probes[:2]
            prober.score(some, [split_thought(text)] * len(some), f"the answer {excerpt(text)}")
        answers["wrong"] = prober.score_lists(probes, [probe.wrong for probe in probes], max)
        answers["hedged"] = prober.score_lists(probes, [probe.hedged for probe in probes], min)
    if kind in ("function", "judge", "model"):
        answers["long"], _ = prober.score(probes, [probe.long for probe in probes], "a long wrong answer")
    if kind == "function":
        by_columns = _score_foreign_columns(prober, probes, answers["reference"])
    return ProbeScores(answers, repeated, scored["reference"][1], by_columns)


def _score_foreign_columns(
    prober: _Prober, probes: Sequence[Probe], references: Sequence[float | None]
) -> list[tuple[float, float]]:
    """Return the references' scores with the row's columns, and with another row's columns behind the same prompt."""
    present = [index for index, probe in enumerate(probes) if probe.other is not None]
    foreign = [
        replace(probes[index], row=probes[other].row | {name: probes[index].row.get(name) for name in ("id", "prompt")})
        for index in present
        if (other := probes[index].other) is not None
    ]
    scores, _ = prober.score(foreign, [probe.reference for probe in foreign], "another row's columns")
    return [(_number(references[index]), _number(score)) for index, score in zip(present, scores, strict=True)]


@dataclass(frozen=True)
class _Prober:
    """Scores answers to probes by one reward."""

    part: Part
    place: str

    def score(
        self,
        probes: Sequence[Probe],
        texts: Sequence[AnswerText | None],
        description: str,
        limit: int | None = None,
    ) -> tuple[list[float | None], list[str]]:
        """Return the scores of the first ``limit`` texts, and a verifier's reasons; None for a missing text.

        Raises ``UserError`` with the ``description`` of the texts for a function that fails.
        """
        present = [index for index, text in enumerate(texts) if text is not None][:limit]
        scores: list[float | None] = [None] * len(texts)
        reasons = [""] * len(texts)
        if not present:
            return scores, reasons
        rows = [probes[index].row for index in present]
        answers = [text for index in present if (text := texts[index]) is not None]
        try:
            scored = self.part.scorer.score(rows, answers, [False] * len(rows))
        except (ScoreFailed, UserError) as error:
            if self.part.scorer.kind != "function":
                raise
            raise UserError(
                f"{self.place}: the score fails at {description}, before training: {str(error).rstrip('.')}. A "
                "policy samples such answers; return a low score for them. With `on_error`, a function of one response "
                "scores them itself; `score_validation: {rows: 0}` validates nothing."
            ) from error
        marks = [(reason, scored.metrics[reason]) for reason in REASONS if reason in scored.metrics]
        for place, index in enumerate(present):
            scores[index] = float(scored.total[place])
            reasons[index] = next((reason for reason, values in marks if values[place] == 1.0), "")
        return scores, reasons

    def score_lists(
        self,
        probes: Sequence[Probe],
        lists: Sequence[Sequence[AnswerText]],
        combine: Callable[[list[float]], float],
    ) -> list[float | None]:
        """Return ``combine`` of the scores of each probe's answers; None for a probe without any."""
        owners = [index for index, texts in enumerate(lists) for _ in texts]
        flat = [text for texts in lists for text in texts]
        scores, _ = self.score([probes[index] for index in owners], flat, "a wrong answer")
        by_probe: dict[int, list[float]] = {}
        for index, score in zip(owners, scores, strict=True):
            by_probe.setdefault(index, []).append(_number(score))
        return [combine(by_probe[index]) if index in by_probe else None for index in range(len(lists))]


def _number(score: float | None) -> float:
    assert score is not None, "every probe has a reference and an empty answer"
    return score


def excerpt(text: str) -> str:
    """Return the end of a text, where answers are, as one printable line."""
    tail = text.strip()[-60:]
    return shorten(repr(tail if len(tail) == len(text.strip()) else f"…{tail}"), 80)
