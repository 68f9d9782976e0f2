"""Answers graded from 1 to 10 by an endpoint, turn by turn, as in MT-Bench. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from align.evaluation.judges import grading
from align.evaluation.judges.judgments import Judgments
from align.evaluation.tasks.base import Answers, Bench, Given, Item, Measured, Metric, Turn
from align.evaluation.tasks.judged_task import JudgedTask, answer_notes, measured, talk

if TYPE_CHECKING:
    from align.evaluation.tasks.judged import JudgedConfig

SCORE = "score"
UNIT = "1 to 10"


class GradedTask(JudgedTask):
    """``score`` is an item's mean over its turns; items of several turns have ``turn1``, ``turn2``, … too."""

    primary = SCORE
    question = grading.QUESTION + grading.COMPARE
    rubric = grading.RUBRIC

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], given: Given) -> None:
        super().__init__(name, config, items, given)
        self.title = f"{self.label}, graded 1 to 10 by {self.by}"
        what = "mean grade of its answers" if self.turns > 1 else "grade of its answer"
        self.metrics = {SCORE: Metric(f"{self.label} grade", "higher", UNIT, f"over questions, {what} by {self.by}")}
        self.by_turn = [f"turn{number + 1}" for number in range(self.turns)] if self.turns > 1 else []
        for number, metric in enumerate(self.by_turn, 1):
            meaning = f"over questions, grade of the answer to message {number} by {self.by}"
            self.metrics[metric] = Metric(f"{self.label} grade, turn {number}", "higher", UNIT, meaning)

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Grades of every system.

        Raises ``UserError`` for a judge whose grades cannot be read, ``EndpointLost`` for one that is gone; what it
        said until then is kept.
        """
        given = {name: [samples[0] for samples in per_item] for name, per_item in answers.items()}
        asked = [
            (name, at, number)
            for name, per_item in given.items()
            for at, turns in enumerate(per_item)
            for number in range(len(turns))
        ]
        questions = [
            grading.grade_question(talk(given[name][at][number]), self.rubric, self.reference(at, number + 1))
            for name, at, number in asked
        ]
        judgments = Judgments(self.config.judge, self.name, bench)
        said = judgments.ask(questions, [name for name, _, _ in asked], _is_grade)
        self.usage = judgments.usage()
        grades = {place: grading.read_grade(one.text) for place, one in zip(asked, said, strict=True)}
        return {
            name: self._measured(
                [[grades[name, at, number] for number in range(len(turns))] for at, turns in enumerate(per_item)],
                per_item,
            )
            for name, per_item in given.items()
        }

    def _measured(self, grades: list[list[float | None]], answers: list[list[Turn]]) -> Measured:
        """An item has part in ``score`` when all its turns have a grade, in a turn's own metric when that has one."""
        columns = {SCORE: [_mean(own) for own in grades]}
        for number, metric in enumerate(self.by_turn):
            columns[metric] = [own[number] if number < len(own) else None for own in grades]
        unreadable = sum(grade is None for own in grades for grade in own)
        return measured(columns, {"unreadable": unreadable, **answer_notes(answers)})


def _is_grade(text: str) -> bool:
    return grading.read_grade(text) is not None


def _mean(grades: list[float | None]) -> float | None:
    known = [grade for grade in grades if grade is not None]
    return sum(known) / len(known) if len(known) == len(grades) else None
