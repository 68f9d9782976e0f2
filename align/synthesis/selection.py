"""Selection of rows from several responses to each prompt: all different ones, or the best. Torch-free.

``run.py`` samples the responses; ``pairing.py`` makes preference pairs of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from align.config.stages.synthesis_tasks import BestOfTask, ResponsesTask
from align.data.rows import Row, assistant, kept_columns
from align.data.scoring import Scorer, parts_of
from align.inference.requests import Answer
from align.synthesis.counts import Ledger

ROWS, ANSWERS = "prompts", "answers"


@dataclass
class PromptResponses:
    """A prompt's row and the responses to it; ``scores`` and ``verdicts`` are filled in later, where there are any."""

    row: Row
    answers: list[Answer]
    scores: list[float | None] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    """Scores and metrics of each reward of a list, by name."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usable(self) -> list[int]:
        """Places of the responses with text."""
        return [place for place, answer in enumerate(self.answers) if not _find_fault(answer, "keep")]

    def score_of(self, place: int) -> float:
        """Return the score of a usable response; scores must have been filled in."""
        score = self.scores[place]
        assert score is not None, "every usable response has a score"
        return score

    def to_json(self, split: str) -> dict[str, Any]:
        """Return a line of ``samples.jsonl``."""
        line: dict[str, Any] = {
            "split": split,
            "id": self.row["id"],
            "prompt": self.row["prompt"],
            "texts": [answer.text for answer in self.answers],
            "finished": [answer.finished for answer in self.answers],
            "tokens": [answer.completion_tokens for answer in self.answers],
        }
        if self.scores:
            line["scores"] = self.scores
        if self.parts:
            line["parts"] = self.parts
        if self.verdicts:
            line["verdicts"] = self.verdicts
        return line


def _find_fault(answer: Answer, cut_off: str) -> str:
    """Return the reason why a response is unusable; empty for a usable one."""
    if answer.error:
        return "request failed"
    if answer.refused:
        return "refused by the endpoint"
    if not answer.text.strip():
        return "empty answer"
    if cut_off == "drop" and not answer.finished:
        return "cut off at max_tokens"
    return ""


def prompt_fields(row: Row) -> Row:
    """Return the fields that a new row copies from the prompt's row."""
    fields = {"id": row["id"], "source": row["source"], "prompt": row["prompt"], "checks": row["checks"] or ""}
    return fields | kept_columns(row)


def usable_places(responses: PromptResponses, cut_off: str, ledger: Ledger) -> list[int]:
    """Return the places of the usable responses; the ledger counts the others as dropped."""
    usable = []
    for place, answer in enumerate(responses.answers):
        ledger.add(ANSWERS)
        reason = _find_fault(answer, cut_off)
        if reason:
            ledger.drop(ANSWERS, reason, f"{responses.row['id']} answer {place}", answer.text, error=answer.error)
        else:
            usable.append(place)
    return usable


def _distinct(responses: PromptResponses, places: list[int], ledger: Ledger) -> list[int]:
    """Return the places without repeated texts; the ledger counts the repeats as dropped."""
    texts: set[str] = set()
    distinct = []
    for place in places:
        text = responses.answers[place].text.strip()
        if text in texts:
            ledger.drop(ANSWERS, "same as another answer", f"{responses.row['id']} answer {place}", text)
        else:
            texts.add(text)
            distinct.append(place)
    return distinct


def select_all(task: ResponsesTask, prompts: list[PromptResponses], ledger: Ledger) -> list[Row]:
    """Return every different response as a row."""
    rows = []
    for responses in prompts:
        ledger.add(ROWS)
        places = _distinct(responses, usable_places(responses, task.cut_off, ledger), ledger)
        if not places:
            ledger.drop(ROWS, "no answer of use", responses.row["id"])
            continue
        ledger.keep(ROWS)
        ledger.keep(ANSWERS, len(places))
        rows += [_instruction(responses, place, task.n > 1) for place in places]
    return rows


def _instruction(responses: PromptResponses, place: int, numbered: bool) -> Row:
    fields = prompt_fields(responses.row)
    name = f"{fields['id']}-{place}" if numbered else fields["id"]
    answer = responses.answers[place]
    return {**fields, "id": name, "completion": [assistant(answer.text)], "completion_finished": answer.finished}


def score_all(prompts: list[PromptResponses], scorer: Scorer) -> None:
    """Fill in the scores of every response with text, and those of a list's rewards, in one call for all prompts."""
    usable = [(responses, place) for responses in prompts for place in responses.usable]
    for responses in prompts:
        responses.scores = [None] * len(responses.answers)
    if not usable:
        return
    # One call for all prompts, so that a reward model fills its batches.
    parts = parts_of(
        scorer,
        [responses.row for responses, _ in usable],
        [responses.answers[place].text for responses, place in usable],
        [not responses.answers[place].finished for responses, place in usable],
    )
    scores = parts.pop("")
    for index, (responses, place) in enumerate(usable):
        responses.scores[place] = scores[index]
        for name, values in parts.items():
            column = responses.parts.setdefault(name, [None] * len(responses.answers))
            column[place] = values[index] if math.isfinite(values[index]) else None


def select_best(task: BestOfTask, prompts: list[PromptResponses], ledger: Ledger) -> list[Row]:
    """Return the best ``keep`` different responses of each prompt, earlier ones first among equals.

    Scores must have been filled in. A prompt whose responses are all the same is dropped, since there was no choice.
    """
    rows = []
    for responses in prompts:
        ledger.add(ROWS)
        usable = usable_places(responses, task.cut_off, ledger)
        texts = {responses.answers[place].text.strip() for place in usable}
        if not usable or (len(usable) > 1 and len(texts) == 1):
            _drop_prompt(responses, usable, ledger)
            continue
        ranked = sorted(_distinct(responses, usable, ledger), key=lambda place: (-responses.score_of(place), place))
        # Ranked by score, so the eligible ones come first.
        eligible = [place for place in ranked if task.min_score is None or responses.score_of(place) >= task.min_score]
        selected = eligible[: task.keep]
        for place in ranked:
            if place not in selected:
                reason = "not among the best" if place in eligible else "score below min_score"
                where = f"{responses.row['id']} answer {place}"
                ledger.drop(ANSWERS, reason, where, responses.answers[place].text, score=responses.score_of(place))
        if not selected:
            best = ranked[0]
            ledger.drop(
                ROWS,
                "no score reaches min_score",
                responses.row["id"],
                responses.answers[best].text,
                best=responses.score_of(best),
            )
            continue
        ledger.keep(ROWS)
        ledger.keep(ANSWERS, len(selected))
        for place in selected:
            rows.append({**_instruction(responses, place, task.keep > 1), "score": responses.score_of(place)})
    return rows


def _drop_prompt(responses: PromptResponses, usable: list[int], ledger: Ledger) -> None:
    """Count a prompt without a choice as dropped, with its usable responses."""
    reason = "all answers the same" if usable else "no answer of use"
    for place in usable:
        ledger.drop(ANSWERS, reason, f"{responses.row['id']} answer {place}", responses.answers[place].text)
    ledger.drop(ROWS, reason, responses.row["id"], responses.answers[usable[0]].text if usable else "")
