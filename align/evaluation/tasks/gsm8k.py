r"""GSM8K (arXiv 2110.14168): grade-school word problems, right when the final number is.

``final`` (the headline) reads an answer as the reward ``gsm8k_answer`` does: behind ``####``, else in ``\boxed{}``,
else the last number (``align.data.final_numbers``). ``strict`` takes the first of these alone, ``flexible`` the last:
chat models seldom write ``####`` unasked (Llama-3.1-8B with its chat template scored 0.20 strict and 0.78 flexible,
lm-evaluation-harness pull request 2034). All compare numbers, not spellings.

lm-eval's filters named strict and flexible give the same verdict on a plainly written number. They call "#### $18",
"18.00" and "18..." wrong, where 18 is right; read "4,5" as 45, "10-3" as -3; and take punctuation behind the number
("... 18. $.") for the last number.

Left out: programs and calculators, and answers behind a reasoning model's thoughts, which are part of its text here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.data.final_numbers import final_number, last_number, marked_number
from align.data.rows import Message, assistant, normalized, user
from align.data.source_configs import FilesSource, HubSource
from align.errors import UserError
from align.evaluation.tasks.base import (
    Answers,
    Bench,
    Example,
    Given,
    Item,
    Measured,
    Metric,
    Respondent,
    Task,
    TaskConfig,
    Turn,
)
from align.evaluation.tasks.reading import TaskData, TaskRecord, draw, item_ids, read_records
from align.evaluation.tasks.sampled import Sampled, answer_counts

FINAL, STRICT, FLEXIBLE = "final", "strict", "flexible"
MOST_EXAMPLES = 32
"""Solved problems that are kept for prompting; more would not fit most models' context."""

METRICS = {
    FINAL: Metric(
        "GSM8K", "higher", "", "share of problems whose number is right: behind ####, else boxed, else the last"
    ),
    FLEXIBLE: Metric("GSM8K (last number)", "higher", "", "share of problems whose answer's last number is right"),
    STRICT: Metric("GSM8K (behind ####)", "higher", "", "share of problems with the right number behind ####"),
}


class Gsm8kConfig(TaskData, Sampled, TaskConfig):
    """Settings of GSM8K. Records: ``question`` and ``answer``, the solution with ``#### number`` at its end."""

    task: Literal["gsm8k"] = "gsm8k"
    shots: int = Field(0, ge=0, le=MOST_EXAMPLES // 2)
    """Solved problems that every system sees as earlier turns; a prompted baseline's own come on top."""
    suffix: str = ""
    """Text after every question, such as an instruction to end with #### and the number."""
    examples_files: list[str] | None = Field(None, min_length=1)
    """Files to take solved problems from. The same as ``files`` will do: what serves as example is then not asked."""
    examples_split: str | None = None
    """Split to take solved problems from, for a dataset of the Hub: train."""

    identified: ClassVar[frozenset[str]] = frozenset({"files", "examples_files"})

    @model_validator(mode="after")
    def _examples_are_somewhere(self) -> Self:
        if self.examples_split is not None and self.files is not None:
            raise ValueError("examples_split is a split on the Hub, and the problems are in files; use examples_files")
        if self.examples_split is not None and self.examples_files is not None:
            raise ValueError("examples come from examples_split or from examples_files; drop one of them")
        if self.shots and self.examples_source() is None:
            raise ValueError("shots need solved problems: give examples_files, or examples_split on the Hub")
        return self

    def examples_source(self) -> FilesSource | HubSource | None:
        """Where solved problems are; None without."""
        if self.examples_files is not None:
            return FilesSource(type="files", paths=self.examples_files)
        source = self.source()
        if self.examples_split is None or isinstance(source, FilesSource):
            return None
        return source.model_copy(update={"split": self.examples_split})

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of both kinds of files."""
        examples = self._examples_identities(base)
        return {**super().identities(base), **{f"examples: {name}": digest for name, digest in examples.items()}}

    def _examples_identities(self, base: Path) -> dict[str, str]:
        from align.data.sources import identity

        if self.examples_files is None:
            return {}
        return identity(FilesSource(type="files", paths=self.examples_files), base)

    def described(self, base: Path) -> dict[str, Any]:
        """What a reader needs to find the same problems and examples."""
        source = self.examples_source()
        found = super().described(base)
        if isinstance(source, HubSource):
            found["examples"] = source.label
        elif source is not None:
            found["examples"] = self._examples_identities(base)
        return found

    def build(self, name: str, given: Given) -> Gsm8kTask:
        """Read problems and examples, and take out what would be both."""
        records, source = read_records(self.source(), given.base), self.examples_source()
        examples = [] if source is None else read_records(source, given.base)
        asked, shown = part(records, examples, given.seed)
        if len(shown) < self.shots:
            raise UserError(
                f"{name}: {self.shots} shots need as many solved problems, and there are {len(shown)} that are not "
                "asked themselves. Give more in examples_files or lower shots."
            )
        left_out = len(records) - len(asked)
        return Gsm8kTask(name, self, draw(asked, self.max_items, given.seed), shown, left_out, given)


class Gsm8kTask(Task):
    """The problems, and others that are solved."""

    responds = True
    kind = "gsm8k"
    title = "GSM8K: grade-school word problems"
    metrics = METRICS
    primary = FINAL

    def __init__(
        self,
        name: str,
        config: Gsm8kConfig,
        asked: list[TaskRecord],
        shown: list[TaskRecord],
        left_out: int,
        given: Given,
    ) -> None:
        self.name, self._config, self._seed, self._left_out = name, config, given.seed, left_out
        self._described = config.described(given.base)
        self._examples = [self._example(record) for record in shown]
        self.items = [self._item(id, record) for id, record in zip(item_ids(asked), asked, strict=True)]

    def _item(self, id: str, record: TaskRecord) -> Item:
        _, number = solution_and_number(record)
        return Item(id, "gsm8k", [user(self._question(record))], {"answer": str(number)})

    def _example(self, record: TaskRecord) -> Example:
        solution, number = solution_and_number(record)
        return Example(self._question(record), f"{solution}\n#### {number:f}")

    def _question(self, record: TaskRecord) -> str:
        return record.text("question").strip() + self._config.suffix

    def examples(self, count: int) -> list[Example]:
        """Solved problems behind those that every system sees anyway."""
        return self._examples[self._config.shots :][:count]

    def settings(self) -> dict[str, Any]:
        """Data, examples, the text after each question and sampling."""
        return {
            "data": self._described,
            "left_out_as_examples": self._left_out,
            "shots": self._config.shots,
            "suffix": self._config.suffix,
            "sampling": self._config.sampling_settings(self._seed),
        }

    def respond(self, respondent: Respondent) -> Answers:
        """Every problem as a user turn, after the shots."""
        shots: list[Message] = []
        for example in self._examples[: self._config.shots]:
            shots += [user(example.question), assistant(example.answer)]
        prompts = [[*shots, *item.prompt] for item in self.items]
        count = respondent.info.shots
        found = respondent.answer(prompts, self._config.sampling(self._seed), self.examples(count) if count else [])
        return [[[Turn(prompt, one)] for one in samples] for prompt, samples in zip(prompts, found, strict=True)]

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Right or not, by each reading; notes count answers without a number."""
        return {system: self._measured(given) for system, given in answers.items()}

    def _measured(self, answers: Answers) -> Measured:
        texts = [[turns[-1].response.text for turns in samples] for samples in answers]
        readings = {FINAL: final_number, FLEXIBLE: last_number, STRICT: marked_number}
        numbers = {name: [[read(text) for text in samples] for samples in texts] for name, read in readings.items()}
        right = [Decimal(item.data["answer"]) for item in self.items]
        values = {
            name: [[float(number == answer) for number in samples] for samples, answer in zip(rows, right, strict=True)]
            for name, rows in numbers.items()
        }
        none = {name: sum(number is None for row in rows for number in row) for name, rows in numbers.items()}
        notes = {"no_number": none[FLEXIBLE], "no_marked_number": none[STRICT]}
        return Measured(values, notes={**answer_counts(answers), **notes})


def solution_and_number(record: TaskRecord) -> tuple[str, Decimal]:
    """A record's solution without the notes to a calculator (``<<48/2=24>>``), and its final number."""
    solution, mark, final = record.text("answer").rpartition("####")
    number = last_number(final)
    if not mark or number is None:
        raise UserError(
            f"{record.where}: field 'answer' has no number behind ####; expected a solution and its number."
        )
    return re.sub(r"<<[^<>]*>>", "", solution).strip(), number


def part(records: list[TaskRecord], examples: list[TaskRecord], seed: int) -> tuple[list[TaskRecord], list[TaskRecord]]:
    """What is asked and what is shown: at most ``MOST_EXAMPLES`` examples in random order, none of them asked.

    Examples that are among the questions are passed over; where all of them are, some (at most half) are drawn and not
    asked.
    """
    generator = random.Random(f"examples of gsm8k {seed}")  # noqa: S311
    questions = {_key(record) for record in records}
    free = {_key(record): record for record in examples if _key(record) not in questions}
    if free or not examples:
        return records, generator.sample(list(free.values()), min(MOST_EXAMPLES, len(free)))
    every = {_key(record): record for record in examples}
    shown = generator.sample(list(every.values()), min(MOST_EXAMPLES, len(questions) // 2, len(every)))
    keys = {_key(record) for record in shown}
    return [record for record in records if _key(record) not in keys], shown


def _key(record: TaskRecord) -> str:
    return normalized(record.text("question"))
