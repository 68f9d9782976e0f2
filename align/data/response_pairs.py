"""Preference pairs from several scored responses to each prompt. Torch-free."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, get_args

from align.config.recipe.step_settings import PairStrategy
from align.data.rows import Message, Row, assistant, kept_columns


class Answers(NamedTuple):
    """The messages of a response on each side of a pair."""

    chosen: list[Message]
    rejected: list[Message]


class Candidate(NamedTuple):
    """One response of a prompt."""

    text: str
    """What it says; two of equal text make no pair."""
    score: float
    sample: int
    """Place among the samples."""
    finished: bool
    """Whether it ended by itself."""


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
    off (``chosen_finished``, ``rejected_finished``), so that training puts no end of turn after them. With probability
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

    ``best_worst`` takes the best and the worst; ``best_random`` the best and a random one with a lower score (by at
    least ``margin``) and another text, where the text ``draw`` seeds the choice; ``adjacent`` each one and the next in
    order of score; ``all`` every two. Fewer than two candidates give no pair.
    """
    if len(candidates) < 2:
        return
    # Samples of one prompt are exchangeable, so the first of several best ones is as good as any.
    best, worst = (
        max(candidates, key=lambda candidate: candidate.score),
        min(candidates, key=lambda candidate: candidate.score),
    )
    if how == "best_worst":
        # ``best`` and ``worst`` are one candidate where all scores tie. The first two then stand for the tie.
        yield (best, worst) if best is not worst else (candidates[0], candidates[1])
    elif how == "best_random":
        lower = [
            # Preferably a partner that the pair can be learned from: clearly lower, and another text.
            candidate
            for candidate in candidates
            if is_separate(best, candidate, margin) and candidate.text.strip() != best.text.strip()
        ]
        others = lower or [candidate for candidate in candidates if candidate is not best]
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
    # Seeded by the pair's own name, so that other prompts do not change which labels flip.
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
