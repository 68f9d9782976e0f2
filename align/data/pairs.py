"""Preference pairs from several scored responses to each prompt. Torch-free."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from align.data.rows import Row, assistant

How = Literal["best_worst", "all", "best_random", "adjacent"]


class Candidate(NamedTuple):
    """One response of a prompt: its text, score, place among the samples, and whether it ended by itself."""

    text: str
    score: float
    sample: int
    finished: bool


def make_pairs(
    rows: list[Row],
    responses: list[list[str]],
    scores: list[list[float]],
    how: How,
    noise: float,
    seed: int,
    finished: list[list[bool]] | None = None,
    ties: list[Row] | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Pair each prompt's responses by score, those that :func:`comparisons` puts side by side.

    ``responses[i]``, ``scores[i]`` and ``finished[i]`` (all True by default) belong to ``rows[i]``. Empty responses
    are left out; a comparison whose texts are identical or whose scores tie makes no pair. A response that was cut
    off keeps that mark in its pair (``chosen_finished``, ``rejected_finished``), so that no end of turn is put behind
    it in training. With probability ``noise`` (each pair's own draw from ``seed``
    and its id, whatever the order) a pair's label is wrong: the texts swap sides, ``flipped`` is True, and
    ``chosen_score`` and ``rejected_score`` stay the true scores of the texts beside them. Comparisons that tie are
    added to ``ties``, where it is given, as pairs whose sides mean nothing.

    Returns the pairs and counts: ``prompts = prompts_too_few + prompts compared``, ``compared = identical + tied +
    pairs``. Raises ``ValueError`` for unequal lengths, a score that is not finite, or ``noise`` outside [0, 1).
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is {noise}; expected a rate in [0, 1)")
    counts = dict.fromkeys(
        ("prompts", "empty_responses", "prompts_too_few", "compared", "identical", "tied", "pairs", "flipped"), 0
    )
    pairs: list[Row] = []
    ended = finished if finished is not None else [[True] * len(texts) for texts in responses]
    for row, texts, values, ends in zip(rows, responses, scores, ended, strict=True):
        if any(not math.isfinite(value) for value in values):
            raise ValueError(f"row {row['id']}: a score is not finite: {values}")
        every = [Candidate(t, float(s), i, e) for i, (t, s, e) in enumerate(zip(texts, values, ends, strict=True))]
        candidates = [candidate for candidate in every if candidate.text.strip()]
        counts["prompts"] += 1
        counts["empty_responses"] += len(texts) - len(candidates)
        counts["prompts_too_few"] += len(candidates) < 2
        for better, worse in comparisons(candidates, how, f"{seed}:{row['id']}"):
            counts["compared"] += 1
            if better.text.strip() == worse.text.strip():
                counts["identical"] += 1
            elif better.score == worse.score:
                counts["tied"] += 1
                if ties is not None:
                    ties.append(_pair(row, better, worse, 0.0, seed))
            else:
                pair = _pair(row, better, worse, noise, seed)
                counts["pairs"] += 1
                counts["flipped"] += pair["flipped"]
                pairs.append(pair)
    return pairs, counts


def comparisons(
    candidates: Sequence[Candidate], how: How, draw: str = "", margin: float = 0.0
) -> Iterator[tuple[Candidate, Candidate]]:
    """The candidates that ``how`` compares, the higher score first; ties among them are the caller's to drop.

    ``best_worst`` takes the best and the worst, ``best_random`` the best and any other whose score is lower (by
    ``margin`` at least) and whose text differs, drawn by the text ``draw`` alone; ``adjacent`` each and the next in
    order of score; ``all`` every two. Nothing comes of fewer than two candidates.
    """
    if len(candidates) < 2:
        return
    # Samples of one prompt are exchangeable, so the first of several best ones is as good as any.
    best, worst = max(candidates, key=lambda c: c.score), min(candidates, key=lambda c: c.score)
    if how == "best_worst":
        yield (best, worst) if best is not worst else (candidates[0], candidates[1])
    elif how == "best_random":
        lower = [c for c in candidates if separate(best, c, margin) and c.text.strip() != best.text.strip()]
        others = lower or [c for c in candidates if c is not best]
        yield best, random.Random(draw).choice(others)  # noqa: S311  (a choice of data, not secrecy)
    elif how == "adjacent":
        yield from pairwise(sorted(candidates, key=lambda c: -c.score))
    elif how == "all":
        for one, other in itertools.combinations(candidates, 2):
            yield (one, other) if one.score >= other.score else (other, one)
    else:
        raise ValueError(f"how is {how!r}; expected {', '.join(get_args(How))}")


def separate(better: Candidate, worse: Candidate, margin: float) -> bool:
    """Whether two scores differ, by ``margin`` at least."""
    return better.score > worse.score and better.score - worse.score >= margin


def _pair(row: Row, better: Candidate, worse: Candidate, noise: float, seed: int) -> Row:
    name = f"{row['id']}-{better.sample}-{worse.sample}"
    flipped = random.Random(f"{seed}:{name}").random() < noise  # noqa: S311  (label noise, not secrecy)
    chosen, rejected = (worse, better) if flipped else (better, worse)
    return {
        "id": name,
        "source": row["source"],
        "prompt": row["prompt"],
        "checks": row["checks"],
        "chosen": [assistant(chosen.text)],
        "rejected": [assistant(rejected.text)],
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
        "chosen_finished": chosen.finished,
        "rejected_finished": rejected.finished,
        "flipped": flipped,
    }
