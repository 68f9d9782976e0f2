"""Preference pairs from several answers to a prompt, by score or rank; ties and equal texts make none. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from align.data.pairs import Candidate, How, comparisons, separate
from align.data.rows import Dropped, Row, assistant
from align.data.steps.base import StepConfig, StepContext
from align.errors import UserError

KINDS = ("preferences", "unpaired")


class PairsStep(StepConfig):
    """Make pairs of a row's ``responses``, and leave out pairs that teach nothing.

    A row that is a pair already stays as it is, unless its scores tie or are nearer than ``margin``. In unpaired data
    an answer becomes a good one if it is the better of all pairs it is in, and a bad one if the worse of all.
    """

    type: Literal["pairs"]
    how: How = "best_worst"
    """Which answers are compared: the best with the worst, with a random one below it, every two (K answers make
    K(K-1)/2 pairs, which weighs prompts with many answers more), or each with the next in order."""
    margin: float = Field(0.0, ge=0)
    """Smallest difference in score, or in places of a ranking, that makes a pair; ties never do."""
    max_per_prompt: int | None = Field(None, ge=1)
    """Most pairs of one row, those with the widest margins."""

    def start(self, context: StepContext) -> Pairs:
        """The step itself. Raises ``UserError`` for a recipe of a kind without pairs."""
        if context.kind not in KINDS:
            raise UserError(f"the step pairs makes preferences, and the recipe's kind is {context.kind}; remove it.")
        return Pairs(self, context.kind, context.seed)


class Pairs:
    """Each row depends on itself, its id and the recipe's seed alone."""

    def __init__(self, config: PairsStep, kind: str, seed: int) -> None:
        self.config, self.kind, self.seed = config, kind, seed

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """The pairs of every row."""
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> Row | Dropped | list[Row]:
        if row.get("responses") is not None:
            return self._several(row)
        if self.kind == "unpaired":
            return row
        if row.get("chosen") is None or row.get("rejected") is None:
            return Dropped("no answers to compare")
        return self._pair(row)

    def _pair(self, row: Row) -> Row | Dropped:
        if row["chosen"] == row["rejected"]:
            return Dropped("chosen equals rejected")
        better, worse = row.get("chosen_score"), row.get("rejected_score")
        if better is None or worse is None:
            return row
        scores = {"chosen_score": better, "rejected_score": worse}
        if better == worse:
            return Dropped("scores tie", scores)
        # Without a margin the data's own word counts: a label may contradict a score on purpose (noise, a judge).
        if better - worse < self.config.margin and self.config.margin > 0:
            return Dropped("scores nearer than the margin", scores)
        return row

    def _several(self, row: Row) -> Dropped | list[Row]:
        candidates = _candidates(row["responses"])
        if len(candidates) < 2:
            return Dropped("fewer than two answers with a score or a rank")
        config = self.config
        found = list(comparisons(candidates, config.how, f"{self.seed}:{row['id']}", config.margin))
        different = [(one, other) for one, other in found if one.text.strip() != other.text.strip()]
        kept = [(one, other) for one, other in different if separate(one, other, config.margin)]
        if not kept:
            return _why_none(different, [candidate.score for candidate in candidates])
        if config.max_per_prompt is not None:
            kept = sorted(kept, key=lambda pair: pair[1].score - pair[0].score)[: config.max_per_prompt]
        if self.kind == "unpaired":
            return _labeled(row, kept) or Dropped("no answer is the better or the worse of all its pairs")
        scored = any(item.get("score") is not None for item in row["responses"])
        return [_made(row, better, worse, scored) for better, worse in kept]


def _candidates(responses: list[dict[str, Any]]) -> list[Candidate]:
    """Answers that say something and can be compared: by score, where any has one, or by rank, the smallest first."""
    scored = any(item.get("score") is not None for item in responses)
    found = []
    for place, item in enumerate(responses):
        value = item.get("score") if scored else item.get("rank")
        if value is not None and item["content"].strip():
            score = float(value) if scored else -float(value)
            found.append(Candidate(item["content"], score, place, item.get("finished") is not False))
    return found


def _why_none(different: list[tuple[Candidate, Candidate]], scores: list[float]) -> Dropped:
    if not different:
        return Dropped("answers are the same")
    tied = all(one.score == other.score for one, other in different)
    return Dropped("answers tie" if tied else "answers nearer than the margin", {"scores": sorted(scores)})


def _rest(row: Row, name: str) -> Row:
    left_out = ("responses", "completion", "completion_finished", "score")
    rest = {key: value for key, value in row.items() if key not in left_out}
    return {**rest, "id": f"{row['id']}-{name}"}


def _made(row: Row, better: Candidate, worse: Candidate, scored: bool) -> Row:
    pair = _rest(row, f"{better.sample}-{worse.sample}")
    pair |= {"chosen": [assistant(better.text)], "rejected": [assistant(worse.text)]}
    if scored:
        pair |= {"chosen_score": better.score, "rejected_score": worse.score}
    for side, answer in (("chosen", better), ("rejected", worse)):
        if not answer.finished:
            pair[f"{side}_finished"] = False
    return pair


def _answered(answer: Candidate) -> Row:
    return {"completion": [assistant(answer.text)], **({} if answer.finished else {"completion_finished": False})}


def _labeled(row: Row, pairs: list[tuple[Candidate, Candidate]]) -> list[Row]:
    """Answers of a row with labels, in the row's order, without those on both sides."""
    good = {better.sample: better for better, _ in pairs}
    bad = {worse.sample: worse for _, worse in pairs}
    both = good.keys() & bad.keys()
    return [
        {**_rest(row, str(place)), **_answered(answer), "label": place in good}
        for place, answer in sorted((good | bad).items())
        if place not in both
    ]
