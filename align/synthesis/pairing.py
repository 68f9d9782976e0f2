"""From several answers to each prompt to preference pairs, by scores or by a judge; ties are kept apart. Torch-free.

Pairs are made by ``align.data.pairs.make_pairs``, as those of the ``sample`` stage are. Left out: noise on labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align.config.stages.synthesis_tasks import PairsTask
from align.data.pairs import make_pairs
from align.data.rows import Message, Row
from align.evaluation.judges.judge import Outcome, Verdict, question, read_verdict, settle
from align.inference.requests import Answer
from align.synthesis.choosing import ANSWERS, ROWS, Answered, base_of, good_of, score_of
from align.synthesis.counts import Book

COMPARED = "comparisons"
UNDECIDED: dict[Outcome, str] = {"tie": "tie", "disagreement": "orders disagree", "unreadable": "verdict not readable"}

AskJudge = Callable[[list[list[Message]]], list[Answer]]


@dataclass
class Paired:
    """What came out: pairs, and comparisons that found neither answer better."""

    pairs: list[Row]
    ties: list[Row]


def pair_by_score(task: PairsTask, answered: list[Answered], seed: int, book: Book) -> Paired:
    """Pairs of answers whose scores differ, by ``task.min_margin`` at least; ``scores`` must be there."""
    found = Paired([], [])
    for one in answered:
        good = _good(one, book)
        ties: list[Row] = []
        pairs, counts = _make_pairs(one, {place: score_of(one, place) for place in good}, task.pairs, seed, ties)
        book.take(COMPARED, counts["compared"])
        for _ in range(counts["identical"]):
            book.drop(COMPARED, "both answers the same", one.row["id"], one.answers[good[0]].text)
        for tie in ties:
            book.drop(COMPARED, "tie", tie["id"], tie["chosen"][0]["content"], score=tie["chosen_score"])
        found.ties += [_as_tie(one, tie, "equal scores", scored=True) for tie in ties]
        wide = []
        for pair in pairs:
            margin = pair["chosen_score"] - pair["rejected_score"]
            if margin < task.min_margin:
                book.drop(COMPARED, "margin below min_margin", pair["id"], margin=margin)
                found.ties.append(_as_tie(one, pair, "margin below min_margin", scored=True))
            else:
                wide.append(pair)
        _close(one, good, wide, book)
        found.pairs += wide
    return found


def pair_by_judge(
    task: PairsTask, answered: list[Answered], rubric: str, ask: AskJudge, seed: int, book: Book
) -> Paired:
    """Pairs that a judge decides, asked in both orders about every two different answers of a prompt.

    With ``best_worst`` the answers with most and fewest wins are paired, if the judge preferred the one to the other
    itself. ``verdicts`` of each prompt are filled in.
    """
    good = [_good(one, book) for one in answered]
    contests = [
        (at, first, second)
        for at, one in enumerate(answered)
        for first, second in itertools.combinations(good[at], 2)
        if one.answers[first].text.strip() != one.answers[second].text.strip()
    ]
    orders = [(at, *pair) for at, one, other in contests for pair in ((one, other), (other, one))]
    said = ask(
        [
            question(answered[at].row["prompt"], answered[at].answers[a].text, answered[at].answers[b].text, rubric)
            for at, a, b in orders
        ]
    )
    outcomes: list[dict[tuple[int, int], Outcome]] = [{} for _ in answered]
    for number, (at, first, second) in enumerate(contests):
        both = said[2 * number : 2 * number + 2]
        straight, swapped = (None if one.error else read_verdict(one.text) for one in both)
        _note(book, straight, swapped)
        outcome = outcomes[at][first, second] = settle(straight, swapped)
        answered[at].verdicts.append(
            {"answers": [first, second], "straight": straight, "swapped": swapped, "outcome": outcome,
             "said": [one.text for one in both]}
        )  # fmt: skip
    found = Paired([], [])
    for one, places, decided in zip(answered, good, outcomes, strict=True):
        pairs = []
        for better, worse, outcome in _contests(places, decided, task.pairs):
            book.take(COMPARED)
            (pair,), _ = _make_pairs(one, {better: 1.0, worse: 0.0}, "best_worst", seed, [])
            if outcome == "one":
                pairs.append(pair)
                continue
            book.drop(COMPARED, UNDECIDED[outcome], pair["id"], pair["chosen"][0]["content"])
            if outcome != "unreadable":
                found.ties.append(_as_tie(one, pair, UNDECIDED[outcome], scored=False))
        _close(one, places, pairs, book)
        found.pairs += pairs
    return found


def _contests(
    places: list[int], decided: dict[tuple[int, int], Outcome], how: Literal["best_worst", "all"]
) -> list[tuple[int, int, Outcome]]:
    """Better and worse answer and whether it is so (``one``), or two answers and why neither is better."""
    turned = {pair: _better_first(pair, outcome) for pair, outcome in decided.items()}
    if how == "all" or not decided:
        return list(turned.values())
    points = dict.fromkeys(places, 0.0)
    for first, second, outcome in turned.values():
        points[first] += 1.0 if outcome == "one" else 0.5
        points[second] += 0.0 if outcome == "one" else 0.5
    compared = [place for place in places if any(place in pair for pair in decided)]
    best = max(compared, key=lambda place: (points[place], -place))
    rivals = [place for place in compared if (min(best, place), max(best, place)) in decided]
    worst = min(rivals, key=lambda place: (points[place], place))
    better, worse, outcome = turned[min(best, worst), max(best, worst)]
    if outcome == "one" and (better != best or points[best] == points[worst]):
        outcome = "disagreement"  # it beat the other, and lost to those that the other beat
    return [(better, worse, outcome)]


def _better_first(pair: tuple[int, int], outcome: Outcome) -> tuple[int, int, Outcome]:
    return (pair[1], pair[0], "one") if outcome == "other" else (*pair, outcome)


def _note(book: Book, straight: Verdict | None, swapped: Verdict | None) -> None:
    """Count what stood first and won: a judge without a bias names the first as often as the second."""
    for verdict in (straight, swapped):
        book.notes[f"judge said {verdict or 'nothing readable'}"] += 1


def _good(one: Answered, book: Book) -> list[int]:
    book.take(ROWS)
    good = good_of(one, "keep", book)
    book.keep(ANSWERS, len(good))
    return good


def _close(one: Answered, good: list[int], pairs: list[Row], book: Book) -> None:
    """Book what became of the prompt and of its pairs."""
    book.keep(COMPARED, len(pairs))
    if pairs:
        book.keep(ROWS)
    else:
        reason = "fewer than two answers of use" if len(good) < 2 else "no answer better than another"
        book.drop(ROWS, reason, one.row["id"])


def _make_pairs(
    one: Answered, scores: dict[int, float], how: Literal["best_worst", "all"], seed: int, ties: list[Row]
) -> tuple[list[Row], dict[str, int]]:
    """Pairs among the answers that have scores here; empty texts take no part, so the others are blanked."""
    texts = [answer.text if place in scores else "" for place, answer in enumerate(one.answers)]
    values = [scores.get(place, 0.0) for place in range(len(texts))]
    finished = [answer.finished for answer in one.answers]
    return make_pairs([base_of(one.row)], [texts], [values], how, 0.0, seed, [finished], ties)


def _as_tie(one: Answered, pair: Row, why: str, *, scored: bool) -> Row:
    """A row of ``ties.parquet``: two answers, of which neither counts as better, and why."""
    both = [
        {
            "content": pair[side][0]["content"],
            "score": pair[f"{side}_score"] if scored else None,
            "rank": None,
            "finished": pair[f"{side}_finished"],
        }
        for side in ("chosen", "rejected")
    ]
    return {**base_of(one.row), "id": pair["id"], "responses": both, "why": why}
