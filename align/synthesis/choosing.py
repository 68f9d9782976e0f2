"""From several answers to each prompt to rows: all of them, or the best. Torch-free.

Left out: how answers come about (``run.py``), and pairs of them (``pairing.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align.config.stages.synthesis_tasks import BestOfTask, ResponsesTask
from align.data.rows import Row, assistant
from align.inference.requests import Answer
from align.synthesis.counts import Book

ROWS, ANSWERS = "prompts", "answers"

Score = Callable[[list[Row], list[str], list[bool]], list[float]]
"""Scores of answers to rows, and whether each was cut off."""


@dataclass
class Answered:
    """A prompt's row and the answers to it; ``scores`` and ``verdicts`` come later, where they do."""

    row: Row
    answers: list[Answer]
    scores: list[float | None] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usable(self) -> list[int]:
        """Answers that say something."""
        return [place for place, answer in enumerate(self.answers) if not _fault(answer, "keep")]

    def to_json(self, split: str) -> dict[str, Any]:
        """A line of ``samples.jsonl``."""
        found: dict[str, Any] = {
            "split": split,
            "id": self.row["id"],
            "prompt": self.row["prompt"],
            "texts": [answer.text for answer in self.answers],
            "finished": [answer.finished for answer in self.answers],
            "tokens": [answer.completion_tokens for answer in self.answers],
        }
        more = {"scores": self.scores, "verdicts": self.verdicts}
        return found | {name: value for name, value in more.items() if value}


def _fault(answer: Answer, cut_off: str) -> str:
    """Why an answer is of no use; empty where it may be one."""
    if answer.error:
        return "request failed"
    if answer.refused:
        return "refused by the endpoint"
    if not answer.text.strip():
        return "empty answer"
    return "cut off at max_tokens" if cut_off == "drop" and not answer.finished else ""


def base_of(row: Row) -> Row:
    """What a made row takes over from the prompt's."""
    return {"id": row["id"], "source": row["source"], "prompt": row["prompt"], "checks": row["checks"] or ""}


def good_of(one: Answered, cut_off: str, book: Book) -> list[int]:
    """Places of the answers that can be used; the others are booked as dropped."""
    good = []
    for place, answer in enumerate(one.answers):
        book.take(ANSWERS)
        reason = _fault(answer, cut_off)
        if reason:
            book.drop(ANSWERS, reason, f"{one.row['id']} answer {place}", answer.text, error=answer.error)
        else:
            good.append(place)
    return good


def _distinct(one: Answered, places: list[int], book: Book) -> list[int]:
    """Places without those whose text another before has; they are booked as dropped."""
    seen: set[str] = set()
    kept = []
    for place in places:
        text = one.answers[place].text.strip()
        if text in seen:
            book.drop(ANSWERS, "same as another answer", f"{one.row['id']} answer {place}", text)
        else:
            seen.add(text)
            kept.append(place)
    return kept


def responses(task: ResponsesTask, answered: list[Answered], book: Book) -> list[Row]:
    """Every different answer as a row."""
    rows = []
    for one in answered:
        book.take(ROWS)
        kept = _distinct(one, good_of(one, task.cut_off, book), book)
        if not kept:
            book.drop(ROWS, "no answer of use", one.row["id"])
            continue
        book.keep(ROWS)
        book.keep(ANSWERS, len(kept))
        rows += [_instruction(one, place, task.n > 1) for place in kept]
    return rows


def _instruction(one: Answered, place: int, numbered: bool) -> Row:
    base = base_of(one.row)
    name = f"{base['id']}-{place}" if numbered else base["id"]
    answer = one.answers[place]
    return {**base, "id": name, "completion": [assistant(answer.text)], "completion_finished": answer.finished}


def score_all(answered: list[Answered], score: Score) -> None:
    """Score every answer that says something, all prompts at once."""
    places = [(one, place) for one in answered for place in one.usable]
    for one in answered:
        one.scores = [None] * len(one.answers)
    if not places:
        return
    values = score(
        [one.row for one, _ in places],
        [one.answers[place].text for one, place in places],
        [not one.answers[place].finished for one, place in places],
    )
    for (one, place), value in zip(places, values, strict=True):
        one.scores[place] = float(value)


def best_of(task: BestOfTask, answered: list[Answered], book: Book) -> list[Row]:
    """The best ``keep`` different answers of each prompt, the first of equals first; ``scores`` must be there.

    A prompt whose answers are all the same is dropped: nothing was chosen there.
    """
    rows = []
    for one in answered:
        book.take(ROWS)
        good = good_of(one, task.cut_off, book)
        texts = {one.answers[place].text.strip() for place in good}
        if not good or (len(good) > 1 and len(texts) == 1):
            reason = "all answers the same" if good else "no answer of use"
            for place in good:
                book.drop(ANSWERS, reason, f"{one.row['id']} answer {place}", one.answers[place].text)
            book.drop(ROWS, reason, one.row["id"], one.answers[good[0]].text if good else "")
            continue
        ranked = sorted(_distinct(one, good, book), key=lambda place: (-score_of(one, place), place))
        fit = [place for place in ranked if task.min_score is None or score_of(one, place) >= task.min_score]
        for place in ranked:
            if place not in fit[: task.keep]:
                reason = "score below min_score" if place not in fit else "not among the best"
                text = one.answers[place].text
                book.drop(ANSWERS, reason, f"{one.row['id']} answer {place}", text, score=score_of(one, place))
        if not fit:
            best = ranked[0]
            book.drop(
                ROWS, "no score reaches min_score", one.row["id"], one.answers[best].text, best=score_of(one, best)
            )
            continue
        book.keep(ROWS)
        book.keep(ANSWERS, len(fit[: task.keep]))
        rows += [{**_instruction(one, at, task.keep > 1), "score": score_of(one, at)} for at in fit[: task.keep]]
    return rows


def score_of(one: Answered, place: int) -> float:
    value = one.scores[place]
    assert value is not None, "every answer of use has a score"
    return value
