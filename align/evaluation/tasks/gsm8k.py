r"""GSM8K (arXiv 2110.14168): grade-school word problems, scored by the final number.

``final`` (the headline) reads an answer as the reward ``gsm8k_answer`` does: after ``####``, else in ``\boxed{}``,
else the last number, and two answers are no answer (``align.data.final_answers``). ``strict`` reads only the number
after ``####``, ``flexible`` only the last, and neither reads fractions or looks for a second answer. Chat models seldom
write ``####`` unasked (Llama-3.1-8B with its chat template scored 0.20 strict and 0.78 flexible, lm-evaluation-harness
pull request 2034). All compare numbers, not spellings.

lm-eval's filters named strict and flexible give the same verdict on a plainly written number. They call "#### $18",
"18.00" and "18..." wrong, where 18 is right; read "4,5" as 45, "10-3" as -3; and mistake punctuation behind the
number ("... 18. $.") for the last number.

Programs and calculators are not supported. Thoughts are never graded; a thought that is not closed has no answer.
"""

from __future__ import annotations

import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from align.config.recipe.source_settings import HubSource
from align.config.stages.evaluation.tasks import MAX_EXAMPLES, Gsm8kConfig
from align.data.final_answers import answer_text, final_number, last_number, marked_number
from align.data.rows import Message, assistant, normalized, user
from align.errors import UserError
from align.evaluation.scorecard import Metric
from align.evaluation.tasks.base import (
    Answers,
    Example,
    Item,
    Measured,
    SampledTask,
    TaskInputs,
    answer_counts,
)
from align.evaluation.tasks.records import TaskRecord, draw, examples_source, read_examples, read_records, record_source

FINAL = "final"
STRICT = "strict"
FLEXIBLE = "flexible"

METRICS = {
    FINAL: Metric(
        "GSM8K", "higher", "", "share of problems whose number is right: behind ####, else boxed, else the last"
    ),
    FLEXIBLE: Metric("GSM8K (last number)", "higher", "", "share of problems whose answer's last number is right"),
    STRICT: Metric("GSM8K (behind ####)", "higher", "", "share of problems with the right number behind ####"),
}


def build(name: str, config: Gsm8kConfig, inputs: TaskInputs) -> Gsm8kTask:
    """Build the task from problems and examples, and keep the two disjoint.

    Raises ``UserError`` if fewer examples than ``shots`` are left.
    """
    records = read_records(record_source(config), inputs.base, config.columns)
    examples = read_examples(config, inputs.base)
    problems, solved = separate_examples(records, examples, inputs.seed)
    if len(solved) < config.shots:
        raise UserError(
            f"{name}: {config.shots} shots need as many solved problems, and there are {len(solved)} that are not "
            "asked themselves. Give more in examples_files or lower shots."
        )
    left_out = len(records) - len(problems)
    drawn_problems = draw(problems, config.max_items, inputs.seed)
    return Gsm8kTask(name, config, drawn_problems, solved, left_out=left_out, inputs=inputs)


class Gsm8kTask(SampledTask):
    """The problems, and other problems with solutions as examples."""

    kind = "gsm8k"
    title = "GSM8K: grade-school word problems"
    metrics = METRICS
    primary = FINAL

    def __init__(
        self,
        name: str,
        config: Gsm8kConfig,
        problems: list[TaskRecord],
        solved: list[TaskRecord],
        *,
        left_out: int,
        inputs: TaskInputs,
    ) -> None:
        super().__init__(name, config, inputs, problems)
        self._left_out = left_out
        self._examples = [self._example(record) for record in solved]

    def make_item(self, id: str, record: TaskRecord) -> Item:
        """Return the item of a problem."""
        _, number = solution_and_number(record)
        return Item(id, "gsm8k", [user(self._question(record))], {"answer": str(number)})

    def describe_data(self, base: Path) -> dict[str, Any]:
        """Return what identifies the problems and the examples. JSON-able."""
        from align.data.sources import identity

        description = super().describe_data(base)
        source = examples_source(self._config)
        if isinstance(source, HubSource):
            description["examples"] = source.label
        elif source is not None:
            description["examples"] = identity(source, base)
        return description

    def _example(self, record: TaskRecord) -> Example:
        solution, number = solution_and_number(record)
        return Example(self._question(record), f"{solution}\n#### {number:f}")

    def _question(self, record: TaskRecord) -> str:
        return f"{record.text('question').strip()}{self._config.suffix}"

    def examples(self, count: int) -> list[Example]:
        """Return solved problems after those that every system sees anyway."""
        return self._examples[self._config.shots :][:count]

    def settings(self) -> dict[str, Any]:
        """Return data, examples, the text after each question and sampling."""
        return {
            "data": self._data,
            "left_out_as_examples": self._left_out,
            "shots": self._config.shots,
            "suffix": self._config.suffix,
            "sampling": self._config.sampling_settings(self._seed),
        }

    def prompts(self) -> list[list[Message]]:
        """Return every problem as a user turn, after the shots."""
        shots: list[Message] = []
        for example in self._examples[: self._config.shots]:
            shots += [user(example.question), assistant(example.answer)]
        return [[*shots, *item.prompt] for item in self.items]

    def measure(self, answers: Answers) -> Measured:
        """Return 1 or 0 for each answer, by each way of reading its number; notes count answers without a number."""
        texts = [[answer_text(turns[-1].response.text) or "" for turns in samples] for samples in answers]
        solutions = [Decimal(item.data["answer"]) for item in self.items]
        values = {}
        missing = {}
        for name, read_number in {FINAL: final_number, FLEXIBLE: last_number, STRICT: marked_number}.items():
            numbers = [[read_number(text) for text in samples] for samples in texts]
            values[name] = [
                [float(number == solution) for number in samples]
                for samples, solution in zip(numbers, solutions, strict=True)
            ]
            missing[name] = sum(number is None for samples in numbers for number in samples)
        notes = {"no_number": missing[FLEXIBLE], "no_marked_number": missing[STRICT]}
        return Measured(values, notes={**answer_counts(answers), **notes})


def solution_and_number(record: TaskRecord) -> tuple[str, Decimal]:
    """Return a record's solution, without calculator annotations (``<<48/2=24>>``), and its final number."""
    solution, mark, final = record.text("answer").rpartition("####")
    number = last_number(final)
    if not mark or number is None:
        raise UserError(
            f"{record.where}: field 'answer' has no number behind ####; expected a solution and its number."
        )
    return re.sub(r"<<[^<>]*>>", "", solution).strip(), number


def separate_examples(
    records: list[TaskRecord], examples: list[TaskRecord], seed: int
) -> tuple[list[TaskRecord], list[TaskRecord]]:
    """Return the problems to ask and at most ``MAX_EXAMPLES`` examples in random order, none of them asked.

    Examples that are among the problems are skipped. If all of them are, some (at most half of the problems) are
    drawn and no longer asked.
    """
    generator = random.Random(f"examples of gsm8k {seed}")  # noqa: S311
    questions = {_key(record) for record in records}
    unasked = {_key(record): record for record in examples if _key(record) not in questions}
    # The usual case: the train split has examples that are not among the problems.
    if unasked or not examples:
        return records, generator.sample(list(unasked.values()), min(MAX_EXAMPLES, len(unasked)))
    distinct = {_key(record): record for record in examples}
    # Examples and problems are one set of records: use some as examples, and do not ask these.
    solved = generator.sample(list(distinct.values()), min(MAX_EXAMPLES, len(questions) // 2, len(distinct)))
    keys = {_key(record) for record in solved}
    return [record for record in records if _key(record) not in keys], solved


def _key(record: TaskRecord) -> str:
    return normalized(record.text("question"))
