"""Preference pairs from several responses to each prompt, by scores or by a judge; ties are separate. Torch-free.

Pairs are made by ``align.data.steps.pairs.make_pairs``, as in the ``sample`` stage, but without label noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align.data.rows import Message, Row, kept_columns
from align.extensions.synthesis.config import PairsTask
from align.extensions.synthesis.selection import ANSWERS, OTHER_BEGINNINGS, ROWS, Ledger, drop_prompt, usable_places
from align.inference.requests import Answer
from align.judges.prompts import Outcome, Verdict, combine_verdicts, fill_rubric, pair_prompt, read_verdict
from align.stages.prompt_responses import PromptResponses, pair_responses

COMPARED = "comparisons"
UNDECIDED: dict[Outcome, str] = {"tie": "tie", "disagreement": "orders disagree", "unreadable": "verdict not readable"}

AskJudge = Callable[[list[list[Message]]], list[Answer]]


@dataclass
class PairingResult:
    """Pairs, and comparisons that found neither response better."""

    pairs: list[Row]
    ties: list[Row]


def pair_by_score(task: PairsTask, prompts: list[PromptResponses], seed: int, ledger: Ledger) -> PairingResult:
    """Pair responses whose scores differ by at least ``task.min_margin``; scores must have been filled in."""
    result = PairingResult([], [])
    for responses in prompts:
        usable = _count_usable(responses, ledger)
        if not responses.begins_alike:
            drop_prompt(responses, [], ledger, OTHER_BEGINNINGS)
            continue
        scores = {place: responses.score_of(place) for place in usable}
        # 1. Compare the responses. Equal texts and equal scores make no pair.
        ties: list[Row] = []
        pairs, counts = pair_responses(responses, scores, task.pairs, seed, ties=ties)
        ledger.add(COMPARED, counts["compared"])
        for _ in range(counts["identical"]):
            ledger.drop(COMPARED, "both answers the same", responses.row["id"], responses.answers[usable[0]].text)
        for tie in ties:
            ledger.drop(COMPARED, "tie", tie["id"], tie["chosen"][-1]["content"], score=tie["chosen_score"])
            result.ties.append(_tie_row(responses, tie, "equal scores", scored=True))
        # 2. Of the pairs, those with too small a margin are ties as well.
        wide_pairs = []
        for pair in pairs:
            margin = pair["chosen_score"] - pair["rejected_score"]
            if margin < task.min_margin:
                ledger.drop(COMPARED, "margin below min_margin", pair["id"], margin=margin)
                result.ties.append(_tie_row(responses, pair, "margin below min_margin", scored=True))
            else:
                wide_pairs.append(pair)
        _count_pairs(responses, usable, wide_pairs, ledger)
        result.pairs += wide_pairs
    return result


@dataclass
class Judge:
    """The judge of a ``pairs`` task: its rubric, and the function that sends it questions."""

    rubric: str
    ask: AskJudge


def pair_by_judge(
    task: PairsTask, prompts: list[PromptResponses], judge: Judge, seed: int, ledger: Ledger
) -> PairingResult:
    """Pair responses by a judge, which compares every two different responses of a prompt in both orders.

    With ``best_worst`` the responses with most and fewest wins are paired, if the judge preferred the first to the
    second in their own comparison. Fills in ``verdicts`` of each prompt.
    """
    usable = [_count_usable(responses, ledger) for responses in prompts]
    # The comparisons of all prompts go out in one call, so an endpoint answers many at a time.
    outcomes = _judge_all(prompts, usable, judge, ledger)
    result = PairingResult([], [])
    for responses, places, prompt_outcomes in zip(prompts, usable, outcomes, strict=True):
        pairs = []
        for better, worse, outcome in _select_comparisons(places, prompt_outcomes, task.pairs):
            ledger.add(COMPARED)
            # Scores of 1 and 0 stand for the verdict, so the pair is built as from scores.
            (pair,), _ = pair_responses(responses, {better: 1.0, worse: 0.0}, "best_worst", seed)
            if outcome == "one":
                pairs.append(pair)
                continue
            ledger.drop(COMPARED, UNDECIDED[outcome], pair["id"], pair["chosen"][0]["content"])
            if outcome != "unreadable":
                result.ties.append(_tie_row(responses, pair, UNDECIDED[outcome], scored=False))
        _count_pairs(responses, places, pairs, ledger)
        result.pairs += pairs
    return result


def _judge_all(
    prompts: list[PromptResponses], usable: list[list[int]], judge: Judge, ledger: Ledger
) -> list[dict[tuple[int, int], Outcome]]:
    """Return for each prompt the outcome of every comparison, by the places of its two responses."""
    comparisons: list[tuple[int, int, int]] = []
    for index, places in enumerate(usable):
        answers = prompts[index].answers
        for first, second in itertools.combinations(places, 2):
            # Equal texts need no judge: that saves a paid request.
            if answers[first].text.strip() != answers[second].text.strip():
                comparisons.append((index, first, second))
    questions = []
    for index, first, second in comparisons:
        responses = prompts[index]
        texts = str(responses.answer_text(first)), str(responses.answer_text(second))
        rubric = fill_rubric(judge.rubric, responses.row, f"prompt {responses.row['id']}")
        # Both orders, since judges prefer a position.
        for shown_first, shown_second in (texts, texts[::-1]):
            questions.append(pair_prompt(responses.row["prompt"], shown_first, shown_second, rubric))
    replies = judge.ask(questions)
    outcomes: list[dict[tuple[int, int], Outcome]] = [{} for _ in prompts]
    for number, (index, first, second) in enumerate(comparisons):
        # Replies come in the order of the questions: two for each comparison, straight and swapped.
        both_orders = replies[2 * number : 2 * number + 2]
        straight, swapped = (None if reply.error else read_verdict(reply.text) for reply in both_orders)
        _count_verdicts(ledger, straight, swapped)
        outcome = combine_verdicts(straight, swapped)
        outcomes[index][first, second] = outcome
        prompts[index].verdicts.append(
            {
                "answers": [first, second],
                "straight": straight,
                "swapped": swapped,
                "outcome": outcome,
                "said": [reply.text for reply in both_orders],
            }
        )
    return outcomes


def _select_comparisons(
    places: list[int], outcomes: dict[tuple[int, int], Outcome], how: Literal["best_worst", "all"]
) -> list[tuple[int, int, Outcome]]:
    """Return the comparisons that ``how`` selects, the better response first if the outcome is ``one``."""
    ordered = {pair: _better_first(pair, outcome) for pair, outcome in outcomes.items()}
    if how == "all" or not outcomes:
        return list(ordered.values())
    # A win is a point, anything undecided half a point for both.
    points = dict.fromkeys(places, 0.0)
    for first, second, outcome in ordered.values():
        points[first] += 1.0 if outcome == "one" else 0.5
        points[second] += 0.0 if outcome == "one" else 0.5
    compared = [place for place in places if any(place in pair for pair in outcomes)]
    best = max(compared, key=lambda place: (points[place], -place))
    # Only responses that were compared with the best: equal texts were not.
    rivals = [place for place in compared if (min(best, place), max(best, place)) in outcomes]
    worst = min(rivals, key=lambda place: (points[place], place))
    better, worse, outcome = ordered[min(best, worst), max(best, worst)]
    if outcome == "one" and (better != best or points[best] == points[worst]):
        outcome = "disagreement"  # the judge's preferences are circular
    return [(better, worse, outcome)]


def _better_first(pair: tuple[int, int], outcome: Outcome) -> tuple[int, int, Outcome]:
    return (pair[1], pair[0], "one") if outcome == "other" else (*pair, outcome)


def _count_verdicts(ledger: Ledger, straight: Verdict | None, swapped: Verdict | None) -> None:
    """Count the position that won: an unbiased judge prefers the first response as often as the second."""
    for verdict in (straight, swapped):
        ledger.notes[f"judge said {verdict or 'nothing readable'}"] += 1


def _count_usable(responses: PromptResponses, ledger: Ledger) -> list[int]:
    """Return the places of the usable responses, and count them."""
    ledger.add(ROWS)
    usable = usable_places(responses, "keep", ledger)
    ledger.keep(ANSWERS, len(usable))
    return usable


def _count_pairs(responses: PromptResponses, usable: list[int], pairs: list[Row], ledger: Ledger) -> None:
    """Count the pairs of a prompt; a prompt without any is dropped."""
    ledger.keep(COMPARED, len(pairs))
    if pairs:
        ledger.keep(ROWS)
    else:
        reason = "fewer than two answers of use" if len(usable) < 2 else "no answer better than another"
        ledger.drop(ROWS, reason, responses.row["id"])


def _tie_row(responses: PromptResponses, pair: Row, why: str, *, scored: bool) -> Row:
    """Return a row of ``ties.parquet``: two responses of which neither counts as better, and the reason."""
    both = [
        {
            "content": pair[side][-1]["content"],
            "score": pair[f"{side}_score"] if scored else None,
            "rank": None,
            "finished": pair[f"{side}_finished"],
        }
        for side in ("chosen", "rejected")
    ]
    fields: Row = {name: pair[name] for name in ("source", "prompt", "checks", "tools") if name in pair}
    return {**fields, **kept_columns(responses.row), "id": pair["id"], "responses": both, "why": why}
