"""Multiple choice by log-likelihood (ARC, MMLU, TruthfulQA, or your own): the choice a model finds likeliest.

No answer is generated. ``acc`` selects the choice with the highest log-likelihood, ``acc_norm`` the choice with the
highest per character, and the first of equals. Prompts and tokens are lm-eval's (its ``hf`` backend, which by default
applies no chat template). TruthfulQA's MC1 always lists its right answer first. Order matters only if choices are
shown with letters; here each is read by itself, so there is no shuffling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.stages.evaluation.tasks import MultipleChoiceConfig
from align.data.rows import Message, assistant, user
from align.errors import UserError
from align.evaluation.answers import Example, Item, Measured
from align.evaluation.scorecard import SystemInfo, read_metrics
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.choice_formats import (
    TRUTHFUL_EXAMPLES,
    Form,
    Question,
    check_first_choice,
    choose_form,
    parse,
)
from align.evaluation.tasks.likelihood import Block, answer_ids, encode_choices, read_blocks, sum_logprobs
from align.evaluation.tasks.records import describe_records, load_records, numbered_ids, read_examples

if TYPE_CHECKING:
    from align.evaluation.participants import Reader

BLOCK = 400
"""Questions per cached result: an interrupted run loses at most one block."""
TITLES = {"arc": "ARC", "mmlu": "MMLU", "truthfulqa": "TruthfulQA", "generic": "Multiple choice"}
IdPair = tuple[list[int], list[int]]
"""Token ids of a context and of a choice after it."""

METRICS: dict[Form, tuple[str, ...]] = {
    "arc": ("acc", "acc_norm"),
    "generic": ("acc", "acc_norm"),
    "mmlu": ("acc",),  # every choice is one letter
    "truthfulqa": ("mc1", "mc2"),
}


def build(name: str, config: MultipleChoiceConfig, inputs: TaskInputs) -> MultipleChoiceTask:
    """Build the task from checked questions and examples. Raises ``UserError`` if there are too few examples."""
    records = load_records(config, inputs.base, inputs.seed)
    form, reason = choose_form(records, config.format)
    if reason:
        inputs.note(f"{name}: format {form}: {reason}")
    if config.shots and form == "truthfulqa":
        raise UserError(f"{name}: TruthfulQA's prompt has six examples already; drop shots.")
    check_first_choice(records, form, config.first_choice)
    questions = [parse(record, form, config.first_choice) for record in records]
    # A question must not be shown with its answer before it is asked.
    ids = {question.id for question in questions}
    solved = [parse(record, form, config.first_choice) for record in read_examples(config, inputs.base)]
    examples = [example for example in solved if example.id not in ids]
    task = MultipleChoiceTask(name, config, form, questions, examples)
    task.description = {"format": form, **describe_records(config, inputs.base)}
    for question in questions:
        task.examples_for(question, config.shots)
    return task


class MultipleChoiceTask(Task):
    """Questions with choices, and solved ones as examples."""

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
        self.name = name
        self.config = config
        self.form = form
        self.renders = config.chat
        self.title = TITLES[form]
        self.questions = list(questions)
        self.solved = list(examples)
        metrics = read_metrics(self.kind)
        self.metrics = {metric: metrics[metric] for metric in METRICS[form]}
        self.primary = "mc2" if form == "truthfulqa" else "acc"
        ids = numbered_ids([question.id for question in self.questions])
        self.items = [
            Item(
                id,
                question.source,
                [user(question.context)],
                {"choices": list(question.choices), "answer": question.answer},
            )
            for id, question in zip(ids, self.questions, strict=True)
        ]
        self.description: dict[str, Any] = {"format": form}

    def examples(self, count: int) -> list[Example]:
        """Return the first solved questions, as a few-shot system shows them."""
        if self.form == "truthfulqa":
            return TRUTHFUL_EXAMPLES[:count]
        return [Example(question.context, question.answer) for question in self.solved[:count]]

    def settings(self) -> dict[str, Any]:
        """Return data, format and prompt."""
        return {
            **self.description,
            "asked_as": "conversation" if self.config.chat else "plain text",
            "shots": self.config.shots,
            "examples": len(self.solved),
            "first_context": self._plain_context(self.questions[0], self.config.shots, ""),
        }

    def examples_for(self, question: Question, count: int, minimum: int | None = None) -> list[Question]:
        """Return the first ``count`` examples for a question, only of its subject if it has a description.

        Raises ``UserError`` if there are fewer than ``minimum`` (by default ``count``).
        """
        if self.form == "truthfulqa":
            return []
        suitable = [example for example in self.solved if not question.description or example.source == question.source]
        if len(suitable) < (count if minimum is None else minimum):
            about = f" about {question.source}" if question.description else ""
            raise UserError(
                f"{self.name}: {count} examples are to be shown and there are {len(suitable)}{about} that are no "
                "question themselves. Lower shots, or name more in the task's examples_files (examples_split for the "
                "Hub)."
            )
        return suitable[:count]

    def check(self, info: SystemInfo) -> None:
        """Check that the task has as many examples as a system shows in plain text."""
        for question in [] if self.config.chat else self.questions:
            self.examples_for(question, info.shots)

    def read(self, reader: Reader) -> Measured:
        """Return the metrics of one system."""
        result = self.read_choices(reader)
        logprobs = result["logprobs"]
        rows = [score(question, values) for question, values in zip(self.questions, logprobs, strict=True)]
        values = {metric: [[row[metric]] for row in rows] for metric in self.metrics}
        return Measured(values, notes={"ties": sum(map(is_tie, self.questions, logprobs)), "inputs_cut": result["cut"]})

    def read_choices(self, reader: Reader) -> dict[str, Any]:
        """Return ``logprobs``: each choice's log-likelihood in nats, by item; and ``cut``, the number of cut inputs."""
        return read_blocks(reader, self.name, self._blocks(reader))

    def _blocks(self, reader: Reader) -> Iterator[Block]:
        for start in range(0, len(self.questions), BLOCK):
            block = self.questions[start : start + BLOCK]
            contexts = [self._context(question, reader.info) for question in block]
            choices = [[context, question.choices] for context, question in zip(contexts, block, strict=True)]
            yield start, ["choices 1", reader.max_length, choices], partial(self._read_block, reader, block, contexts)

    def _read_block(self, reader: Reader, block: Sequence[Question], contexts: Sequence[Any]) -> dict[str, Any]:
        encode = _encode_conversations if self.config.chat else _encode_texts
        pairs = encode(reader, block, contexts)
        sums, _, cut = sum_logprobs(reader, [pair for choices in pairs for pair in choices], self.name)
        remaining = iter(sums)
        return {"logprobs": [[next(remaining) for _ in choices] for choices in pairs], "cut": cut}

    def _context(self, question: Question, info: SystemInfo) -> Any:
        """Return the text before the choices, or the conversation and the examples for the system. JSON-able."""
        count = info.shots or self.config.shots
        if not self.config.chat:
            return self._plain_context(question, count, info.system)
        # A system with shots may bring its own examples, which precede the task's.
        examples = self.examples_for(question, count, minimum=0 if info.shots else None)
        turns = [turn for example in examples for turn in (user(example.context), assistant(example.answer))]
        # The description begins the first user turn, whichever that is; many templates have no system turn.
        opening, *rest = [*([] if info.shots else turns), user(question.context)]
        prompt: list[Message] = [{**opening, "content": question.description + opening["content"]}, *rest]
        return [prompt, [[example.context, example.answer] for example in examples] if info.shots else []]

    def _plain_context(self, question: Question, count: int, system: str) -> str:
        """Join system text, description, examples and question into one text."""
        parts = [f"{system}\n\n"] if system else []
        parts.append(question.description)
        parts += [f"{example.context} {example.answer}\n\n" for example in self.examples_for(question, count)]
        return "".join([*parts, question.context])


def score(question: Question, logprobs: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one question from its choices' log-likelihoods (nats)."""
    if question.rivals:
        rivals = [logprobs[index] for index in question.rivals]
        # A softmax over the answers: their probabilities as shares of one.
        # Subtract the highest before ``exp``, which would underflow for long answers.
        highest = max(logprobs[index] for index, _ in question.truths)
        weights = [(math.exp(logprobs[index] - highest), is_true) for index, is_true in question.truths]
        true_weight = math.fsum(weight for weight, is_true in weights if is_true)
        return {
            "mc1": float(_argmax(rivals) == question.gold),
            "mc2": true_weight / math.fsum(weight for weight, _ in weights),
        }
    # Longer choices have lower log-likelihoods; per character, as lm-eval's ``acc_norm`` counts.
    by_length = [value / len(choice) for value, choice in zip(logprobs, question.choices, strict=True)]
    return {
        "acc": float(_argmax(logprobs) == question.gold),
        "acc_norm": float(_argmax(by_length) == question.gold),
    }


def is_tie(question: Question, logprobs: Sequence[float]) -> bool:
    """Return True if more than one choice has the highest log-likelihood."""
    values = [logprobs[index] for index in question.rivals] if question.rivals else list(logprobs)
    return values.count(max(values)) > 1


def _argmax(values: Sequence[float]) -> int:
    """Return the index of the highest value, the first of equals, as numpy does."""
    return max(range(len(values)), key=values.__getitem__)


def _encode_texts(reader: Reader, block: Sequence[Question], contexts: Sequence[str]) -> list[list[IdPair]]:
    return [
        encode_choices(reader.tokenizer, text, [f" {choice}" for choice in question.choices])
        for question, text in zip(block, contexts, strict=True)
    ]


def _encode_conversations(reader: Reader, block: Sequence[Question], contexts: Sequence[Any]) -> list[list[IdPair]]:
    # An answer's tokens depend on the template and the answer, not on the question, so each is rendered once.
    choice_ids: dict[str, list[int]] = {}
    pairs = []
    for question, (prompt, examples) in zip(block, contexts, strict=True):
        context = reader.render(prompt, [Example(*pair) for pair in examples])
        for choice in question.choices:
            if choice not in choice_ids:
                choice_ids[choice] = answer_ids(reader.tokenizer, [user("?")], choice, is_finished=False)[0]
        pairs.append([(context, choice_ids[choice]) for choice in question.choices])
    return pairs
