"""The ``pairs`` step: preference pairs from several answers to a prompt, by score or rank. Torch-free.

Answers with equal scores or equal texts make no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.recipe.step_settings import PairsStep
from align.data.response_pairs import Candidate, compare_candidates, is_separate
from align.data.row_texts import has_equal_sides
from align.data.rows import Dropped, Row, assistant
from align.data.steps.base import StepContext
from align.errors import UserError

KINDS = ("preferences", "unpaired")

CandidatePair = tuple[Candidate, Candidate]
"""The better and the worse answer."""


class Pairs:
    """Replaces each row by its pairs. A row's result depends on the row, its id and the recipe's seed alone.

    Raises ``UserError`` for a recipe of a kind without pairs.
    """

    def __init__(self, config: PairsStep, context: StepContext) -> None:
        if context.kind not in KINDS:
            raise UserError(f"the step pairs makes preferences, and the recipe's kind is {context.kind}; remove it.")
        self.config, self.kind, self.seed = config, context.kind, context.seed

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """Return the pairs of every row."""
        return [self._convert(row) for row in rows]

    def _convert(self, row: Row) -> Row | Dropped | list[Row]:
        if row.get("responses") is not None:
            return self._compare_responses(row)
        # In unpaired data such a row is a labeled answer already.
        if self.kind == "unpaired":
            return row
        if row.get("chosen") is None or row.get("rejected") is None:
            return Dropped("no answers to compare")
        return self._check_pair(row)

    def _check_pair(self, row: Row) -> Row | Dropped:
        """Return a row that is a pair already, or the reason why it teaches nothing."""
        if has_equal_sides(row):
            return Dropped("chosen equals rejected")
        better, worse = row.get("chosen_score"), row.get("rejected_score")
        if better is None or worse is None:
            return row
        scores = {"chosen_score": better, "rejected_score": worse}
        if better == worse:
            return Dropped("scores tie", scores)
        # Without a margin the data's own labels count: a label may contradict a score on purpose (noise, a judge).
        if better - worse < self.config.margin and self.config.margin > 0:
            return Dropped("scores nearer than the margin", scores)
        return row

    def _compare_responses(self, row: Row) -> Dropped | list[Row]:
        candidates = _candidates(row["responses"])
        if len(candidates) < 2:
            return Dropped("fewer than two answers with a score or a rank")
        config = self.config
        # Select pairs by rule, then drop those that teach nothing: equal texts, and scores that are too close.
        compared = compare_candidates(candidates, config.how, f"{self.seed}:{row['id']}", config.margin)
        different = [(better, worse) for better, worse in compared if better.text.strip() != worse.text.strip()]
        pairs = [(better, worse) for better, worse in different if is_separate(better, worse, config.margin)]
        if not pairs:
            return _no_pairs(different, [candidate.score for candidate in candidates])
        if config.max_per_prompt is not None:
            # The widest margins first; the sort is stable, so ties keep their order.
            pairs = sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)[: config.max_per_prompt]
        if self.kind == "unpaired":
            return _labeled_rows(row, pairs) or Dropped("no answer is the better or the worse of all its pairs")
        has_scores = any(item.get("score") is not None for item in row["responses"])
        return [_pair_row(row, better, worse, has_scores) for better, worse in pairs]


def _candidates(responses: list[dict[str, Any]]) -> list[Candidate]:
    """Return the answers with text and a score, where any has one, or else with a rank, the smallest the best."""
    has_scores = any(item.get("score") is not None for item in responses)
    candidates = []
    for place, item in enumerate(responses):
        value = item.get("score") if has_scores else item.get("rank")
        if value is not None and item["content"].strip():
            score = float(value) if has_scores else -float(value)
            candidates.append(Candidate(item["content"], score, place, item.get("finished") is not False))
    return candidates


def _no_pairs(different: list[CandidatePair], scores: list[float]) -> Dropped:
    if not different:
        return Dropped("answers are the same")
    all_tied = all(better.score == worse.score for better, worse in different)
    return Dropped("answers tie" if all_tied else "answers nearer than the margin", {"scores": sorted(scores)})


def _copy_without_answers(row: Row, suffix: str) -> Row:
    answers = ("responses", "completion", "completion_finished", "score")
    rest = {key: value for key, value in row.items() if key not in answers}
    return {**rest, "id": f"{row['id']}-{suffix}"}


def _pair_row(row: Row, better: Candidate, worse: Candidate, has_scores: bool) -> Row:
    pair = _copy_without_answers(row, f"{better.sample}-{worse.sample}")
    pair |= {"chosen": [assistant(better.text)], "rejected": [assistant(worse.text)]}
    if has_scores:
        pair |= {"chosen_score": better.score, "rejected_score": worse.score}
    for side, answer in (("chosen", better), ("rejected", worse)):
        if not answer.finished:
            pair[f"{side}_finished"] = False
    return pair


def _labeled_rows(row: Row, pairs: list[CandidatePair]) -> list[Row]:
    """Return the answers of a row with labels, in the row's order, without those that are good and bad."""
    good = {better.sample: better for better, _ in pairs}
    bad = {worse.sample: worse for _, worse in pairs}
    labeled = []
    for sample, answer in sorted((good | bad).items()):
        # Better than one answer and worse than another: neither label would be right.
        if sample in good and sample in bad:
            continue
        new = {**_copy_without_answers(row, str(sample)), "completion": [assistant(answer.text)]}
        if not answer.finished:
            new["completion_finished"] = False
        labeled.append({**new, "label": sample in good})
    return labeled
