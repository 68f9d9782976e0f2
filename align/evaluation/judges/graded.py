"""The base of judged tasks, in which systems answer turn by turn, and answers graded 1 to 10. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.config.stages.evaluation_tasks import JudgedConfig
from align.data.rows import Message, assistant, user
from align.evaluation.judges import judge_prompts as prompts
from align.evaluation.judges.client import JudgeClient
from align.evaluation.tasks.base import (
    Answers,
    Item,
    Measured,
    Metric,
    Respondent,
    ScoringContext,
    Task,
    TaskInputs,
    Turn,
)
from align.evaluation.tasks.task_records import describe_records
from align.inference.protocol import Sampling
from align.store.fingerprint import digest

LABELS = {"mt_bench": "MT-Bench", "alpaca_eval": "AlpacaEval"}
SCORE = "score"
UNIT = "1 to 10"


class JudgedTask(Task):
    """Questions, and the judge of their answers."""

    responds = True
    kind = "judged"
    prompt = ""
    """The prompt template of the judge."""
    rubric = ""
    """Criteria for a good answer, unless the settings have others."""

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], inputs: TaskInputs) -> None:
        self.name = name
        self.items = items
        self.config = config
        self.seed = inputs.seed
        self.label = LABELS.get(config.preset or "", name)
        self.turns = 1 + max(len(item.data["later"]) for item in items)
        endpoint = config.judge.endpoint
        self.judge_name = endpoint.model if endpoint is not None else config.judge.reward_field or ""
        self.usage: dict[str, Any] = {}
        """Requests, tokens and cost of the judge, after scoring."""
        self._data = describe_records(config, inputs.base)
        self.rubric = config.judge.rubric or self.rubric

    def settings(self) -> dict[str, Any]:
        """Return data, sampling, judge and the digest of its prompt; after scoring also the judge's usage."""
        config = self.config
        judge = dict(config.judge.identity())
        if config.judge.endpoint is not None:
            judge |= {"rubric": self.rubric, "question": digest(self.prompt)[:12]}
        sources = sorted({item.source for item in self.items})
        return {
            "data": self._data,
            "preset": config.preset,
            "mode": config.judging_mode,
            "turns": self.turns,
            "references": sum(bool(item.data["references"]) for item in self.items),
            "sampling": {
                "max_tokens": config.max_tokens,
                "temperature": {source: config.sampling_temperature(source) for source in sources},
                "top_p": config.top_p,
                "seed": self.seed,
            },
            "judge": judge,
            "usage": self.usage,
        }

    def respond(self, respondent: Respondent) -> Answers:
        """Have a system answer turn by turn; later user messages follow the system's own earlier answers."""
        # MT-Bench samples each category at its own temperature; a batch has one temperature and one turn.
        by_temperature: dict[float, list[int]] = {}
        for index, item in enumerate(self.items):
            by_temperature.setdefault(self.config.sampling_temperature(item.source), []).append(index)
        answers: Answers = [[] for _ in self.items]
        for temperature, indices in sorted(by_temperature.items()):
            for turn in range(self.turns):
                sampling = Sampling(self.config.max_tokens, temperature, self.config.top_p, seed=self.seed + turn)
                if turn == 0:
                    self._answer_first(respondent, sampling, indices, answers)
                else:
                    self._answer_later(respondent, sampling, indices, answers, turn)
        return answers

    def _answer_first(self, respondent: Respondent, sampling: Sampling, indices: list[int], answers: Answers) -> None:
        messages = [list(self.items[index].prompt) for index in indices]
        responses = respondent.answer(messages, sampling, self.examples(respondent.info.shots))
        for index, prompt, samples in zip(indices, messages, responses, strict=True):
            answers[index] = [[Turn(prompt, response)] for response in samples]

    def _answer_later(
        self, respondent: Respondent, sampling: Sampling, indices: list[int], answers: Answers, turn: int
    ) -> None:
        """Continue the conversations that have a user message for this turn.

        A best-of-N system has N conversations to each question; the best is chosen when they are complete.
        """
        continued = []
        for index in indices:
            later = self.items[index].data["later"]
            if len(later) >= turn:
                continued += [(turns, later[turn - 1]) for turns in answers[index]]
        if not continued:
            return
        messages = [[*conversation(turns[-1]), user(text)] for turns, text in continued]
        examples = self.examples(respondent.info.shots)
        responses = respondent.answer(messages, sampling, examples, is_continuation=True)
        # ``turns`` is the list inside ``answers``, which grows in place.
        for (turns, _), prompt, samples in zip(continued, messages, responses, strict=True):
            turns.append(Turn(prompt, samples[0]))

    def rubric_of(self, index: int) -> str:
        """Return the rubric for one question, with the columns of its record that it quotes."""
        item = self.items[index]
        return prompts.fill_rubric(self.rubric, item.data.get("record", {}), f"{self.name}: question {item.id}")

    def reference(self, index: int, turns: int) -> str:
        """Return the reference answers to an item's first messages, as a judge reads them; empty for none."""
        references = self.items[index].data["references"][:turns]
        return prompts.format_references(references) if references else ""


class GradedTask(JudgedTask):
    """Answers graded by an endpoint, turn by turn, as in MT-Bench.

    ``score`` is an item's mean over its turns; items of several turns also have ``turn1``, ``turn2``, and so on.
    """

    primary = SCORE
    prompt = prompts.GRADE_PROMPT + prompts.REFERENCE_NOTE
    rubric = prompts.GRADE_RUBRIC

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], inputs: TaskInputs) -> None:
        super().__init__(name, config, items, inputs)
        self.title = f"{self.label}, graded 1 to 10 by {self.judge_name}"
        grade = "mean grade of its answers" if self.turns > 1 else "grade of its answer"
        meaning = f"over questions, {grade} by {self.judge_name}"
        self.metrics = {SCORE: Metric(f"{self.label} grade", "higher", UNIT, meaning)}
        self.turn_metrics = [f"turn{number + 1}" for number in range(self.turns)] if self.turns > 1 else []
        for number, metric in enumerate(self.turn_metrics, 1):
            meaning = f"over questions, grade of the answer to message {number} by {self.judge_name}"
            self.metrics[metric] = Metric(f"{self.label} grade, turn {number}", "higher", UNIT, meaning)

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Return the grades of every system.

        Raises ``UserError`` for a judge whose grades are unreadable, ``EndpointLost`` for a server that is gone; its
        replies until then are cached.
        """
        first_samples = {name: [samples[0] for samples in per_item] for name, per_item in answers.items()}
        # The answers of all systems and turns are graded in one call.
        places = [
            (name, index, turn)
            for name, per_item in first_samples.items()
            for index, turns in enumerate(per_item)
            for turn in range(len(turns))
        ]
        questions = [
            prompts.grade_prompt(
                conversation(first_samples[name][index][turn]), self.rubric_of(index), self.reference(index, turn + 1)
            )
            for name, index, turn in places
        ]
        client = JudgeClient(self.config.judge, self.name, context)
        replies = client.ask(questions, [name for name, _, _ in places], _is_grade)
        self.usage = client.usage()
        grades = {place: prompts.read_grade(reply.text) for place, reply in zip(places, replies, strict=True)}
        measured = {}
        for name, per_item in first_samples.items():
            rows = [[grades[name, index, turn] for turn in range(len(turns))] for index, turns in enumerate(per_item)]
            measured[name] = self._measured(rows, per_item)
        return measured

    def _measured(self, grades: list[list[float | None]], answers: list[list[Turn]]) -> Measured:
        """Return a system's numbers.

        An item counts in ``score`` where all its turns have a grade, and in a turn's metric where that turn has one.
        """
        columns = {SCORE: [_mean(row) for row in grades]}
        for turn, metric in enumerate(self.turn_metrics):
            columns[metric] = [row[turn] if turn < len(row) else None for row in grades]
        unreadable = sum(grade is None for row in grades for grade in row)
        return measured_columns(columns, {"unreadable": unreadable, **answer_notes(answers)})


def conversation(turn: Turn) -> list[Message]:
    """Return a turn's prompt with its answer."""
    return [*turn.prompt, assistant(turn.response.text)]


def answer_notes(answers: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """Count one system's answers over all turns: cut off at the limit, blank, mean characters."""
    responses = [turn.response for turns in answers for turn in turns]
    return {
        "answers": len(responses),
        "cut_off": sum(not response.finished for response in responses),
        "empty": sum(not response.text.strip() for response in responses),
        "mean_characters": round(sum(len(response.text) for response in responses) / max(1, len(responses)), 1),
    }


def measured_columns(columns: Mapping[str, Sequence[float | None]], notes: dict[str, Any]) -> Measured:
    """Return values of one sample each; an item without a number gets weight 0, so that statistics leave it out."""
    values = {name: [[0.0 if value is None else value] for value in column] for name, column in columns.items()}
    weights = {
        name: [float(value is not None) for value in column] for name, column in columns.items() if None in column
    }
    return Measured(values, weights, notes)


def _is_grade(text: str) -> bool:
    return prompts.read_grade(text) is not None


def _mean(grades: list[float | None]) -> float | None:
    readable = [grade for grade in grades if grade is not None]
    # A question with an unreadable grade is left out: the mean of its other turns would not be comparable.
    return sum(readable) / len(readable) if len(readable) == len(grades) else None
