"""Judged tasks: their questions, systems' answers turn by turn, and grades from 1 to 10. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.recipe.source_settings import FilesSource
from align.config.stages.evaluation.tasks import JudgedConfig
from align.data.rows import Message, assistant, user
from align.errors import UserError
from align.evaluation.answers import Answers, Item, Measured, Turn
from align.evaluation.judge import JudgeClient
from align.evaluation.scorecard import Metric
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.records import TaskRecord, describe_records, item_ids, read_records
from align.evaluation.tasks.sampled import response_counts
from align.inference.protocol import Sampling
from align.judges import prompts
from align.store.fingerprint import digest

if TYPE_CHECKING:
    from align.evaluation.participants import Respondent
    from align.evaluation.scoring import ScoringContext

ID_FIELDS = ("question_id", "prompt_id", "id")
SOURCE_FIELDS = ("category", "dataset", "source")
"""Fields that may hold an item's category: MT-Bench's, AlpacaEval's, a row's of this project."""
ROLES = ("system", "user", "assistant")
QUESTION_FIELDS = ("turns", "instruction", "prompt", "question")
REFERENCED_CATEGORIES = frozenset({"math", "reasoning", "coding"})
"""Categories of MT-Bench whose answers FastChat judges with a reference (llm_judge/common.py, NEED_REF_CATS)."""
LABELS = {"mt_bench": "MT-Bench", "alpaca_eval": "AlpacaEval"}
SCORE = "score"
UNIT = "1 to 10"


def check_records(config: JudgedConfig, records: list[TaskRecord]) -> None:
    """Check the fields that the preset and ``against`` need in every record."""
    for record in records:
        if config.preset == "mt_bench":
            record.text("category")
        if config.against != "file":
            continue
        if not isinstance(record["output"], str):
            raise record.field_error("output", "text: the answer that systems are compared with")
        if isinstance(record.get("turns"), list) and len(record["turns"]) > 1:
            raise UserError(
                f"{record.where}: there are {len(record['turns'])} turns and one output; `against: file` compares "
                "answers to single questions."
            )


def make_items(
    records: Sequence[TaskRecord],
    references: dict[str, list[str]] | None,
    categories: frozenset[str] | None,
    name: str,
) -> list[Item]:
    """Return one item per record.

    ``data`` has ``later`` (user messages after the first answer), ``references`` (an answer to each message, or none)
    and ``output`` (an answer that came with the question, or None). ``references`` are by the records' ids; None uses
    the records' own. ``categories`` restricts references to some categories. Raises ``UserError`` for a record without
    a question, and for references that belong to no record.
    """
    field = next((name for name in ID_FIELDS if name in records[0]), None)
    ids = item_ids(list(records), field)
    if references is not None and not set(references) & set(ids):
        raise UserError(
            f"references_files: none of {len(references)} references has the id of a question; the questions' are "
            f"{ids[0]}, … (field {field or 'question_id'}), the references' {next(iter(references), 'none')}, …."
        )
    items = []
    for id, record in zip(ids, records, strict=True):
        prompt, later = _question(record)
        source = str(next((record[field] for field in SOURCE_FIELDS if record.get(field)), name))
        item_references: list[str] = []
        if categories is None or source in categories:
            item_references = _record_references(record) if references is None else references.get(id, [])
        output = record.get("output")
        data: dict[str, Any] = {
            "later": later,
            "references": item_references,
            "output": output if isinstance(output, str) else None,
        }
        data["record"] = dict(record)
        items.append(Item(id, source, prompt, data))
    return items


def read_references(files: list[str], base: Path) -> dict[str, list[str]]:
    """Return reference answers by the id of their question.

    Records are FastChat's (``question_id`` and ``choices`` with ``turns``), or have ``reference``, a text or a list.
    """
    by_id: dict[str, list[str]] = {}
    for record in read_records(FilesSource(type="files", paths=files), base):
        field = next((name for name in ID_FIELDS if name in record), ID_FIELDS[0])
        if "choices" in record:
            try:
                turns: Any = record["choices"][0]["turns"]
            except (TypeError, LookupError):
                raise record.field_error("choices", "a list of one choice with turns, as FastChat writes it") from None
            references = TaskRecord(record.where, {"turns": turns}).texts("turns")
        else:
            references = _record_references(record)
            if not references:
                raise UserError(
                    f"{record.where}: there is no reference answer; expected `choices` with turns, or `reference`."
                )
        by_id[str(record[field])] = references
    return by_id


def _question(record: TaskRecord) -> tuple[list[Message], list[str]]:
    """Return the first conversation to answer, and the user's messages after each answer."""
    field = next((name for name in QUESTION_FIELDS if record.get(name) is not None), None)
    if field is None:
        raise UserError(
            f"{record.where}: no field holds a question; expected one of {', '.join(QUESTION_FIELDS)}, there are "
            f"{', '.join(sorted(record)) or 'none'}."
        )
    value = record[field]
    if isinstance(value, str):
        # Alpaca's records have an instruction and perhaps an input, which belongs to the question.
        text = record.text(field)
        extra = record.get("input") if field == "instruction" else None
        if isinstance(extra, str) and extra.strip():
            text = f"{text}\n\n{extra}"
        return [user(text)], []
    messages = record.messages(field)
    if messages is not None:
        if messages[-1]["role"] != "user" or any(message["role"] not in ROLES for message in messages):
            raise record.field_error(field, "messages of system, user and assistant, of which the user's is the last")
        return [{"role": message["role"], "content": message["content"]} for message in messages], []
    turns = record.texts(field)
    if not all(turn.strip() for turn in turns):
        raise record.field_error(field, "texts that are not blank")
    return [user(turns[0])], turns[1:]


def _record_references(record: TaskRecord) -> list[str]:
    value = record.get("reference")
    if not value:
        return []
    return [value] if isinstance(value, str) else record.texts("reference")


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
        self.judgment_lines: list[dict[str, Any]] = []
        self._data = describe_records(config, inputs.base)
        self.rubric = config.judge.rubric or self.rubric

    def judgments(self) -> list[dict[str, Any]]:
        """Return the judge's replies; a reward model has none."""
        return self.judgment_lines

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
        self.judgment_lines = [
            {
                "task": self.name,
                "id": self.items[index].id,
                "system": name,
                "turn": turn + 1,
                "grade": grades[name, index, turn],
                "text": reply.text,
            }
            for (name, index, turn), reply in zip(places, replies, strict=True)
        ]
        measured = {}
        for name, per_item in first_samples.items():
            rows = [[grades[name, index, turn] for turn in range(len(turns))] for index, turns in enumerate(per_item)]
            measured[name] = self._measured(rows, per_item)
        return measured

    def _measured(self, grades: list[list[float | None]], answers: list[list[Turn]]) -> Measured:
        """Return a system's numbers.

        An item counts in ``score`` if all its turns have a grade, and in a turn's metric if that turn has one.
        """
        columns = {SCORE: [_mean(row) for row in grades]}
        for turn, metric in enumerate(self.turn_metrics):
            columns[metric] = [row[turn] if turn < len(row) else None for row in grades]
        unreadable = sum(grade is None for row in grades for grade in row)
        return measured_columns(columns, {"unreadable": unreadable, **answer_notes(answers)})


def conversation(turn: Turn) -> list[Message]:
    """Return a turn's prompt with its answer, without the thought."""
    return [*turn.prompt, assistant(str(turn.response.answer_text))]


def answer_notes(answers: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """Count one system's answers over all turns: cut off at the limit, blank, mean characters."""
    responses = [turn.response for turns in answers for turn in turns]
    return {
        **response_counts(responses),
        "mean_characters": round(sum(len(response.answer_text) for response in responses) / max(1, len(responses)), 1),
    }


def measured_columns(columns: Mapping[str, Sequence[float | None]], notes: dict[str, Any]) -> Measured:
    """Return values of one sample each; an item without a number gets weight 0, so statistics skip it."""
    values = {name: [[0.0 if value is None else value] for value in column] for name, column in columns.items()}
    weights = {
        name: [float(value is not None) for value in column] for name, column in columns.items() if None in column
    }
    return Measured(values, weights, notes)


def _is_grade(text: str) -> bool:
    return prompts.read_grade(text) is not None


def _mean(grades: list[float | None]) -> float | None:
    readable = [grade for grade in grades if grade is not None]
    # A question with an unreadable grade is skipped: the mean of its other turns would not be comparable.
    return sum(readable) / len(readable) if len(readable) == len(grades) else None
