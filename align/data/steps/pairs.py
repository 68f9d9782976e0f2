"""The ``pairs`` step: preference pairs from several answers to a prompt, by score or rank. Torch-free.

Answers with equal scores or equal texts make no pair.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

from align.config.recipe.step_settings import PairsStep, PairStrategy
from align.data.row_texts import has_equal_sides
from align.data.rows import Dropped, Message, Row, assistant, kept_columns
from align.data.steps.step import StepContext
from align.errors import UserError

KINDS = ("preferences", "unpaired")


class Pairs:
    """Replaces each row by its pairs. A row's result depends on the row, its id and the recipe's seed only.

    Raises ``UserError`` for a recipe of a kind without pairs.
    """

    def __init__(self, config: PairsStep, context: StepContext) -> None:
        if context.kind not in KINDS:
            raise UserError(f"the step pairs makes preferences, and the recipe's kind is {context.kind}; remove it.")
        self.config = config
        self.kind = context.kind
        self.seed = context.seed

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
        """Return a row that is a pair already, or the reason why it is useless."""
        if has_equal_sides(row):
            return Dropped("chosen equals rejected")
        better = row.get("chosen_score")
        worse = row.get("rejected_score")
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
        # Select pairs by rule, then drop the useless ones: equal texts, and scores that are too close.
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


class Answers(NamedTuple):
    """The messages of a response on each side of a pair."""

    chosen: list[Message]
    rejected: list[Message]


class Candidate(NamedTuple):
    """One response of a prompt."""

    text: str
    """The content; two responses of equal text make no pair."""
    score: float
    sample: int
    """Place among the samples."""
    finished: bool
    """True for a response that ended by itself."""


CandidatePair = tuple[Candidate, Candidate]
"""The better and the worse answer."""


def make_pairs(
    rows: list[Row],
    responses: list[list[str]],
    scores: list[list[float]],
    how: PairStrategy,
    *,
    noise: float,
    seed: int,
    finished: list[list[bool]] | None = None,
    answers: list[list[Answers]] | None = None,
    ties: list[Row] | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Pair each prompt's responses by score, as :func:`compare_candidates` selects them.

    ``responses[i]``, ``scores[i]`` and ``finished[i]`` (all True by default) belong to ``rows[i]``. Empty responses
    are skipped; a comparison with identical texts or tied scores makes no pair. A pair records which responses were cut
    off (``chosen_finished``, ``rejected_finished``), so training puts no end of turn after them. With probability
    ``noise`` (drawn from ``seed`` and the pair's id, independent of the order) a pair's label is wrong: the texts swap
    sides, ``flipped`` is True, and ``chosen_score`` and ``rejected_score`` stay the true scores of the texts that they
    belong to. ``answers`` are the messages of responses that are more than one turn of the assistant, such as episodes.
    Tied comparisons are appended to ``ties``, if it is not None, as pairs whose sides mean nothing.

    Returns the pairs and counts: ``prompts = prompts_too_few + prompts compared``, ``compared = identical + tied +
    pairs``. Raises ``ValueError`` for unequal lengths, a score that is not finite, or ``noise`` outside [0, 1).
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is {noise}; expected a rate in [0, 1)")
    counts = dict.fromkeys(
        ("prompts", "empty_responses", "prompts_too_few", "compared", "identical", "tied", "pairs", "flipped"), 0
    )
    pairs: list[Row] = []
    if finished is None:
        finished = [[True] * len(texts) for texts in responses]
    for index, (row, texts, values, ends) in enumerate(zip(rows, responses, scores, finished, strict=True)):
        if any(not math.isfinite(value) for value in values):
            raise ValueError(f"row {row['id']}: a score is not finite: {values}")
        row_answers = None if answers is None else answers[index]
        candidates = [
            Candidate(text, float(value), sample, end)
            for sample, (text, value, end) in enumerate(zip(texts, values, ends, strict=True))
            if text.strip()
        ]
        # Every prompt and every comparison is counted under exactly one outcome.
        counts["prompts"] += 1
        counts["empty_responses"] += len(texts) - len(candidates)
        counts["prompts_too_few"] += len(candidates) < 2
        for better, worse in compare_candidates(candidates, how, f"{seed}:{row['id']}"):
            counts["compared"] += 1
            if better.text.strip() == worse.text.strip():
                counts["identical"] += 1
            elif better.score == worse.score:
                counts["tied"] += 1
                if ties is not None:
                    ties.append(_pair(row, better, worse, 0.0, seed, row_answers))
            else:
                pair = _pair(row, better, worse, noise, seed, row_answers)
                counts["pairs"] += 1
                counts["flipped"] += pair["flipped"]
                pairs.append(pair)
    return pairs, counts


def compare_candidates(
    candidates: Sequence[Candidate], how: PairStrategy, draw: str = "", margin: float = 0.0
) -> Iterator[tuple[Candidate, Candidate]]:
    """Yield the pairs of candidates that ``how`` compares, the higher score first, ties included.

    ``best_worst`` compares the best and the worst; ``best_random`` the best and a random candidate with a lower score
    (by at least ``margin``) and another text, with a choice seeded by ``draw``; ``adjacent`` each candidate and the
    next in order of score; ``all`` every two. Fewer than two candidates give no pair.
    """
    if len(candidates) < 2:
        return
    # Samples of one prompt are exchangeable, so the first of several best ones is as good as any.
    best = max(candidates, key=lambda candidate: candidate.score)
    worst = min(candidates, key=lambda candidate: candidate.score)
    if how == "best_worst":
        # ``best`` and ``worst`` are one candidate where all scores tie. The first two then stand for the tie.
        yield (best, worst) if best is not worst else (candidates[0], candidates[1])
    elif how == "best_random":
        # Preferably a partner that the pair can be learned from: clearly lower, and another text.
        lower = [candidate for candidate in candidates if is_separate(best, candidate, margin)]
        distinct = [candidate for candidate in lower if candidate.text.strip() != best.text.strip()]
        others = distinct or [candidate for candidate in candidates if candidate is not best]
        yield best, random.Random(draw).choice(others)  # noqa: S311  (a choice of data, not secrecy)
    elif how == "adjacent":
        yield from pairwise(sorted(candidates, key=lambda candidate: -candidate.score))
    elif how == "all":
        for first, second in itertools.combinations(candidates, 2):
            yield (first, second) if first.score >= second.score else (second, first)
    else:
        raise ValueError(f"how is {how!r}; expected {', '.join(get_args(PairStrategy))}")


def is_separate(better: Candidate, worse: Candidate, margin: float) -> bool:
    """Return True where ``better`` has the higher score, by at least ``margin``."""
    return better.score > worse.score and better.score - worse.score >= margin


def _pair(
    row: Row, better: Candidate, worse: Candidate, noise: float, seed: int, answers: list[Answers] | None = None
) -> Row:
    name = f"{row['id']}-{better.sample}-{worse.sample}"
    # The pair's own name seeds the flip, so other prompts do not change which labels flip.
    flipped = random.Random(f"{seed}:{name}").random() < noise  # noqa: S311  (label noise, not secrecy)
    chosen, rejected = (worse, better) if flipped else (better, worse)
    return {
        "id": name,
        "source": row["source"],
        "prompt": row["prompt"],
        "checks": row["checks"],
        "chosen": [assistant(chosen.text)] if answers is None else answers[chosen.sample].chosen,
        "rejected": [assistant(rejected.text)] if answers is None else answers[rejected.sample].rejected,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "chosen_finished": chosen.finished,
        "rejected_finished": rejected.finished,
        "flipped": flipped,
        **({"tools": row["tools"]} if row.get("tools") else {}),
        **kept_columns(row),
    }
