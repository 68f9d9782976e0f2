"""Grades from 1 to 10 as scores. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from align.config.endpoint import RewardJudge
from align.config.verifiers import UNREADABLE
from align.data.rows import Row, assistant
from align.data.scoring import Parts
from align.judges import prompts
from align.judges.client import JudgmentCaches, judge_request, stage_judge
from align.judges.scorer import JudgeScorer


class GradeScorer(JudgeScorer):
    """Scores responses by a judge's grade, from 0 to 1. ``unreadable`` is 1 for a grade that could not be read."""

    def score_parts(
        self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> Parts:
        """Return the scores under ``""``, and ``unreadable`` per response, 0 or 1. Equal responses are asked once.

        Raises as ``JudgeScorer.score_parts`` does.
        """
        requests = [
            judge_request(
                self.judge.identity,
                self.config,
                prompts.grade_prompt([*row["prompt"], assistant(response)], self._rubric(row), self._reference(row)),
            )
            for row, response in zip(rows, responses, strict=True)
        ]
        answers = self.judge.ask(requests)
        grades = [prompts.read_grade(answer.text) for answer in answers]
        self._count([answer for answer, grade in zip(answers, grades, strict=True) if grade is None], len(requests))
        # An unreadable grade counts as the lowest one, and ``unreadable`` marks it.
        scale = prompts.MAX_GRADE - prompts.MIN_GRADE
        return {
            "": [0.0 if grade is None else (grade - prompts.MIN_GRADE) / scale for grade in grades],
            UNREADABLE: [float(grade is None) for grade in grades],
        }

    def _rubric(self, row: Row) -> str:
        """Return the rubric for a response to this row, with the columns that it quotes."""
        return prompts.fill_rubric(
            self.config.rubric or prompts.GRADE_RUBRIC, row, f"{self.place}.judge.rubric: row {row['id']}"
        )


def grade_scorer(config: RewardJudge, caches: JudgmentCaches, place: str, processes: int = 1) -> GradeScorer:
    """Return the scorer of grades by an endpoint. Raises ``UserError`` when the endpoint's key is not set."""
    return GradeScorer(config, stage_judge(config, caches, place, processes), place)
