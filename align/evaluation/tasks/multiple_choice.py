"""Multiple choice by log-likelihood (ARC, MMLU, TruthfulQA, one's own): which choice a model finds likeliest.

Nothing is generated. ``acc`` takes the choice of the highest log-likelihood, ``acc_norm`` that of the highest per
character of the choice; of equal ones the first. Prompts and tokens are lm-eval's (its ``hf`` backend, which by default
applies no chat template). TruthfulQA's MC1 always has its right answer first: that matters where choices are shown
with letters, and here each is read by itself, so nothing is shuffled. Left out: choices asked for by generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.data.evaluation_sets import HUB
from align.data.rows import Message, assistant, user
from align.data.source_configs import FilesSource
from align.errors import UserError
from align.evaluation.tasks.base import Example, Given, Item, Measured, Metric, Reader, SystemInfo, Task, TaskConfig
from align.evaluation.tasks.choice_formats import TRUTHFUL_EXAMPLES, Form, Question, choose_form, parse
from align.evaluation.tasks.encoding import answer_ids, encode_choices, fit
from align.evaluation.tasks.reading import TaskData, TaskRecord, read_records
from align.store.fingerprint import digest

BLOCK = 400
"""Questions read between two results on disk: what an interrupted reading loses."""
TITLES = {"arc": "ARC", "mmlu": "MMLU", "truthfulqa": "TruthfulQA", "generic": "Multiple choice"}

_ACC = Metric("accuracy", "higher", "share", "questions whose right choice has the highest log-likelihood")
_ACC_NORM = Metric(
    "accuracy, per character",
    "higher",
    "share",
    "as acc, each choice's log-likelihood divided by its number of characters, so that short ones have no advantage",
)
_MC1 = Metric("MC1", "higher", "share", "questions whose best answer is likelier than every false one")
_MC2 = Metric("MC2", "higher", "probability", "share of the answers' probability that is on true ones")
METRICS: dict[str, dict[str, Metric]] = {
    "arc": {"acc": _ACC, "acc_norm": _ACC_NORM},
    "generic": {"acc": _ACC, "acc_norm": _ACC_NORM},
    "mmlu": {"acc": _ACC},  # every choice is one letter
    "truthfulqa": {"mc1": _MC1, "mc2": _MC2},
}
_USUAL = {
    "arc": HUB["arc_easy"],
    "mmlu": HUB["mmlu"],
    "truthfulqa": {**HUB["truthfulqa"], "config": "multiple_choice"},
}


class MultipleChoiceConfig(TaskData, TaskConfig):
    """Multiple choice by log-likelihood."""

    task: Literal["multiple_choice"] = "multiple_choice"
    format: Literal["auto", "arc", "mmlu", "truthfulqa", "generic"] = "auto"
    """How a record is spelled; ``auto`` looks at the first hundred and says what it chose. ``generic`` has
    ``question``, ``choices`` and ``answer`` (number from 0, letter or text), and ``category`` for the table by source.
    """
    chat: bool = False
    """false reads plain text, lm-eval's default; true puts the question into a user turn under the chat template and
    reads each choice as the assistant's answer, without the end of its turn."""
    shots: int = Field(0, ge=0, le=64)
    """Solved examples before every question, the first of the examples; of the same subject for MMLU. A prompted
    system's own number of shots takes its place."""
    examples_files: list[str] | None = Field(None, min_length=1)
    """Files of examples, spelled as the questions are; those that are questions themselves are left out."""
    examples_split: str | None = None
    """For a dataset of the Hub: the split that the examples are in (dev for MMLU, train for ARC)."""

    identified: ClassVar[frozenset[str]] = frozenset({"files", "examples_files"})

    def usual(self) -> dict[str, str] | None:
        """Where the Hub keeps the benchmark that ``format`` names."""
        return _USUAL.get(self.format)

    @model_validator(mode="after")
    def _examples_fit(self) -> Self:
        if self.examples_files is not None and self.examples_split is not None:
            raise ValueError("it has examples_files and examples_split; drop one of them")
        if self.examples_split is not None and self.files is not None:
            raise ValueError("examples_split is a split of a dataset of the Hub; with files, name examples_files")
        if self.shots and self.format == "truthfulqa":
            raise ValueError("TruthfulQA's prompt has six examples of its own; drop shots")
        if self.shots and self.examples_files is None and self.examples_split is None:
            raise ValueError(f"shots is {self.shots} and there are no examples; name examples_files or examples_split")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the files, those of the examples as well."""
        from align.data.sources import identity

        found = super().identities(base)
        if self.examples_files is not None:
            own = identity(FilesSource(type="files", paths=self.examples_files), base)
            found |= {f"examples: {file}": value for file, value in own.items()}
        return found

    def build(self, name: str, given: Given) -> MultipleChoiceTask:
        """Read and check every question and example."""
        records = self.records(given.base, given.seed)
        form, why = choose_form(records, self.format)
        if why:
            print(f"{name}: format {form}: {why}")
        questions = [parse(record, form) for record in records]
        asked = {question.id for question in questions}
        examples = [one for record in self._example_records(given.base) if (one := parse(record, form)).id not in asked]
        task = MultipleChoiceTask(name, self, form, questions, examples)
        task.described = {"format": form, **self.described(given.base)}
        if self.shots and form == "truthfulqa":
            raise UserError(f"{name}: TruthfulQA's prompt has six examples of its own; drop shots.")
        for question in questions:
            task.shown(question, self.shots)
        return task

    def _example_records(self, base: Path) -> list[TaskRecord]:
        if self.examples_files is not None:
            return read_records(FilesSource(type="files", paths=self.examples_files), base)
        if self.examples_split is not None:
            return read_records(self.source().model_copy(update={"split": self.examples_split}), base)
        return []


class MultipleChoiceTask(Task):
    """See the module."""

    reads = True
    kind = "multiple_choice"

    def __init__(
        self,
        name: str,
        config: MultipleChoiceConfig,
        form: Form,
        questions: Sequence[Question],
        examples: Sequence[Question] = (),
    ) -> None:
        self.name, self.config, self.form = name, config, form
        self.renders = config.chat
        self.title = TITLES[form]
        self.questions = list(questions)
        self.solved = list(examples)
        self.metrics = METRICS[form]
        self.primary = "mc2" if form == "truthfulqa" else "acc"
        self.items = _items(self.questions)
        self.described: dict[str, Any] = {"format": form}

    def examples(self, count: int) -> list[Example]:
        """The first solved questions, as a system prompted with examples shows them."""
        if self.form == "truthfulqa":
            return list(TRUTHFUL_EXAMPLES[:count])
        return [Example(one.context, one.answer) for one in self.solved[:count]]

    def settings(self) -> dict[str, Any]:
        """Data, format and way of asking."""
        return {
            **self.described,
            "asked_as": "conversation" if self.config.chat else "plain text",
            "shots": self.config.shots,
            "examples": len(self.solved),
            "first_context": self._plain(self.questions[0], self.config.shots, ""),
        }

    def shown(self, question: Question, count: int, least: int | None = None) -> list[Question]:
        """The first ``count`` examples for a question: those of its own subject where it has a description.

        Raises ``UserError`` where there are fewer than ``least`` (by default ``count``).
        """
        if self.form == "truthfulqa":
            return []
        of_kind = [one for one in self.solved if not question.description or one.source == question.source]
        if len(of_kind) < (count if least is None else least):
            about = f" about {question.source}" if question.description else ""
            raise UserError(
                f"{self.name}: {count} examples are to be shown and there are {len(of_kind)}{about} that are no "
                "question themselves. Lower shots, or name more in the task's examples_files (examples_split for the "
                "Hub)."
            )
        return of_kind[:count]

    def check(self, info: SystemInfo) -> None:
        """In plain text, a system's shots are this task's own examples."""
        for question in [] if self.config.chat else self.questions:
            self.shown(question, info.shots)

    def choice_logprobs(self, reader: Reader) -> list[list[float]]:
        """Log-likelihood of each choice of each item, in nats: the sum over the choice's tokens."""
        return self._read(reader)[0]

    def read(self, reader: Reader) -> Measured:
        """The metrics of one system."""
        logprobs, cut = self._read(reader)
        rows = [score(question, values) for question, values in zip(self.questions, logprobs, strict=True)]
        values = {metric: [[row[metric]] for row in rows] for metric in self.metrics}
        return Measured(values, notes={"ties": sum(map(is_tie, self.questions, logprobs)), "inputs_cut": cut})

    def _read(self, reader: Reader) -> tuple[list[list[float]], int]:
        found: list[list[float]] = []
        cut = 0
        for start in range(0, len(self.questions), BLOCK):
            block = self.questions[start : start + BLOCK]
            asked = [self._asked(question, reader.info) for question in block]
            identity = digest(
                ["choices 1", reader.max_length, [[a, one.choices] for a, one in zip(asked, block, strict=True)]]
            )
            kept = reader.kept(f"{self.name}-{start}", identity, partial(self._read_block, reader, block, asked))
            found += kept["logprobs"]
            cut += kept["cut"]
        return found, cut

    def _read_block(self, reader: Reader, block: Sequence[Question], asked: Sequence[Any]) -> dict[str, Any]:
        encoded = _conversations if self.config.chat else _texts
        pairs = encoded(reader, block, asked)
        fitted = [fit(*pair, reader.max_length) for each in pairs for pair in each]
        flat = iter(reader.logprobs([context for context, _, _ in fitted], [answer for _, answer, _ in fitted]))
        sums = [[math.fsum(next(flat)) for _ in each] for each in pairs]
        if any(math.isnan(value) for values in sums for value in values):
            raise RuntimeError(f"{self.name}: '{reader.info.name}' gives probabilities that are not numbers (NaN)")
        return {"logprobs": sums, "cut": sum(cut for _, _, cut in fitted)}

    def _asked(self, question: Question, info: SystemInfo) -> Any:
        """JSON-able: the text before the choices, or the conversation and the examples offered to the system."""
        count = info.shots or self.config.shots
        if not self.config.chat:
            return self._plain(question, count, info.system)
        # A system with shots of its own may have examples of its own as well, which stand in front of the task's.
        shown = self.shown(question, count, least=0 if info.shots else None)
        turns = [turn for one in shown for turn in (user(one.context), assistant(one.answer))]
        opening, *rest = [*([] if info.shots else turns), user(question.context)]
        prompt: list[Message] = [{**opening, "content": question.description + opening["content"]}, *rest]
        return [prompt, [[one.context, one.answer] for one in shown] if info.shots else []]

    def _plain(self, question: Question, count: int, system: str) -> str:
        """System text, description, examples, question: paragraphs of one text."""
        parts = [f"{system}\n\n"] if system else []
        parts.append(question.description)
        parts += [f"{one.context} {one.answer}\n\n" for one in self.shown(question, count)]
        return "".join([*parts, question.context])


def score(question: Question, logprobs: Sequence[float]) -> dict[str, float]:
    """The metrics of one question from its choices' log-likelihoods (nats)."""
    if question.rivals:
        rivals = [logprobs[index] for index in question.rivals]
        # A softmax over the answers: their probabilities as shares of one.
        most = max(logprobs[index] for index, _ in question.truths)
        weights = [(math.exp(logprobs[index] - most), true) for index, true in question.truths]
        right = math.fsum(weight for weight, true in weights if true)
        return {
            "mc1": float(_first_best(rivals) == question.gold),
            "mc2": right / math.fsum(weight for weight, _ in weights),
        }
    by_length = [value / len(choice) for value, choice in zip(logprobs, question.choices, strict=True)]
    return {
        "acc": float(_first_best(logprobs) == question.gold),
        "acc_norm": float(_first_best(by_length) == question.gold),
    }


def is_tie(question: Question, logprobs: Sequence[float]) -> bool:
    """Whether more than one choice has the highest log-likelihood."""
    values = [logprobs[index] for index in question.rivals] if question.rivals else list(logprobs)
    return values.count(max(values)) > 1


def _first_best(values: Sequence[float]) -> int:
    """Index of the highest value, the first of equals, as numpy's argmax."""
    return max(range(len(values)), key=values.__getitem__)


def _texts(reader: Reader, block: Sequence[Question], asked: Sequence[str]) -> list[list[tuple[list[int], list[int]]]]:
    return [
        encode_choices(reader.tokenizer, text, [f" {choice}" for choice in question.choices])
        for question, text in zip(block, asked, strict=True)
    ]


def _conversations(
    reader: Reader, block: Sequence[Question], asked: Sequence[Any]
) -> list[list[tuple[list[int], list[int]]]]:
    # What an answer's tokens are depends on the template and itself, not on the question, so each is rendered once.
    known: dict[str, list[int]] = {}
    found = []
    for question, (prompt, examples) in zip(block, asked, strict=True):
        context = reader.render(prompt, [Example(*one) for one in examples])
        for choice in question.choices:
            if choice not in known:
                known[choice] = answer_ids(reader.tokenizer, [user("?")], choice, finished=False)[0]
        found.append([(context, known[choice]) for choice in question.choices])
    return found


def _items(questions: Sequence[Question]) -> list[Item]:
    """Items with ids that differ also where a question is there twice."""
    seen: dict[str, int] = {}
    found = []
    for question in questions:
        seen[question.id] = number = seen.get(question.id, 0) + 1
        data = {"choices": list(question.choices), "answer": question.answer}
        found.append(Item(question.id, question.source, [user(question.context)], data))
        if number > 1:
            found[-1] = replace(found[-1], id=f"{question.id}-{number}")
    return found
