"""Multiple-choice records in the formats of ARC, MMLU, TruthfulQA, or a generic one, as questions. Torch-free.

A question is the text that a model continues and the continuations it chooses between; both are written as lm-eval's
``arc_easy``, ``mmlu`` and ``truthfulqa_mc1`` write them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from align.data.formats.fields import Malformed
from align.data.formats.records import LETTERS, Choices, describe_answers, gather_choices, read_choices, right_choice
from align.errors import UserError
from align.evaluation.answers import Example
from align.evaluation.tasks.records import TaskRecord

Form = Literal["arc", "mmlu", "truthfulqa", "generic"]
DETECTION_RECORDS = 100
"""Records that ``format: auto`` looks at."""
MANY_ANSWERS = 20
"""Answers among which the first choice should be right at least once."""

BENCHMARKS = Path(__file__).parents[1] / "benchmarks.json"
TRUTHFUL_EXAMPLES = [Example(**fields) for fields in json.loads(BENCHMARKS.read_text("utf-8"))["truthfulqa"]]
"""The benchmark's own "QA" prompt (arXiv 2109.07958), shown before every question."""


@dataclass(frozen=True)
class Question:
    """A question with its choices."""

    source: str
    context: str
    """Text up to the answer's start."""
    choices: tuple[str, ...]
    """Continuations, without the space between context and answer; all different for TruthfulQA."""
    gold: int = 0
    """Index of the right choice; for TruthfulQA among ``rivals``."""
    description: str = ""
    """Text once before the examples and the question."""
    rivals: tuple[int, ...] = ()
    """TruthfulQA's MC1: indices of the competing choices, of which exactly one is right."""
    truths: tuple[tuple[int, bool], ...] = field(default=())
    """TruthfulQA's MC2: (index, is true) of the choices that share the probability."""

    @property
    def id(self) -> str:
        """Digest of context and choices, 16 hex digits."""
        text = "\0".join([self.context, *self.choices])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def answer(self) -> str:
        """Text of the right choice."""
        return self.choices[self.rivals[self.gold] if self.rivals else self.gold]


def choose_form(records: Sequence[TaskRecord], form: Form | Literal["auto"]) -> tuple[Form, str]:
    """Return the records' format and the reason; the reason is empty for a format that the settings name.

    Raises ``UserError`` if ``auto`` finds no format that fits all of the first hundred records.
    """
    if form != "auto":
        return form, ""
    # Stricter formats come first: the generic format also fits MMLU's records.
    for candidate, fits, reason in _DETECTORS:
        if all(fits(record) for record in records[:DETECTION_RECORDS]):
            return candidate, reason
    first = records[0]
    raise UserError(
        f"{first.where}: no format of multiple choice fits: the fields are {', '.join(sorted(first)) or 'none'}. "
        "Expected question, choices and answer, or the fields of ARC, MMLU or TruthfulQA; name the format in `format`, "
        "and its fields will be asked for by name."
    )


def parse(record: TaskRecord, form: Form, first_choice: int | None = None) -> Question:
    """Return a record's question; ``first_choice`` is the number of the first choice.

    Raises ``UserError`` with the record's place if it does not fit its format.
    """
    if form in ("mmlu", "generic"):
        return _PARSERS_WITH_NUMBERS[form](record, first_choice)
    return _PARSERS[form](record)


def _arc(record: TaskRecord) -> Question:
    if "instruction" in record:
        return _instruction(record)
    choices = _options(record)
    key = str(record["answerKey"])
    if key not in choices.labels:
        labels = ", ".join(choices.labels) or "none"
        raise UserError(
            f"{record.where}: answerKey is '{key}', and the labels of the choices are {labels}; expected a mapping of "
            "text and label, as in allenai/ai2_arc, with the key among the labels."
        )
    return _cloze(record, record.text("question"), list(choices.texts), choices.labels.index(key), "arc")


_INTRODUCTION = re.compile(r"^\s*(?:please\s+)?choose the correct (?:answer|option)[^:\n]*:\s*", re.IGNORECASE)
_ANSWER_FORMAT = re.compile(r"\s*answer format:.*$", re.IGNORECASE | re.DOTALL)


def _instruction(record: TaskRecord) -> Question:
    """Parse ARC as an instruction: question, "Answer1: ... Answer2: ...", and ``answer`` with the right number."""
    text = _ANSWER_FORMAT.sub("", record.text("instruction"))
    parts = []
    start = 0
    # Labels are searched in order, so "answer 4" inside a choice is not mistaken for a label.
    for number in range(1, len(LETTERS) + 1):
        label = re.compile(rf"(?:^|(?<=\s))answer\s?{number}:\s*", re.IGNORECASE).search(text, start)
        if label is None:
            break
        parts.append(text[start : label.start()].strip())
        start = label.end()
    question, *choices = [*parts, text[start:].strip()]
    answer = re.fullmatch(r"\s*answer\s?(\d+)\s*", str(record["answer"]), re.IGNORECASE)
    if len(choices) < 2 or answer is None or not 1 <= int(answer[1]) <= len(choices):
        raise UserError(
            f"{record.where}: found {len(choices)} choices and the answer {record['answer']!r}; expected a question "
            "with 'Answer1: ... Answer2: ...' behind it and an answer such as 'answer2'."
        )
    return _cloze(record, _INTRODUCTION.sub("", question), choices, int(answer[1]) - 1, "arc")


def _mmlu(record: TaskRecord, first_choice: int | None) -> Question:
    choices = list(_options(record).texts)
    subject = record.text("subject").replace("_", " ")
    lines = [f"{LETTERS[index]}. {choice}" for index, choice in enumerate(choices)]
    return Question(
        source=subject,
        context="\n".join([record.text("question").strip(), *lines, "Answer:"]),
        choices=tuple(LETTERS[: len(choices)]),
        gold=_gold(record, _options(record), first_choice),
        description=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
    )


def _generic(record: TaskRecord, first_choice: int | None) -> Question:
    choices = _options(record)
    source = next((record[name] for name in ("subject", "category", "source") if record.get(name)), "generic")
    gold = _gold(record, choices, first_choice)
    return _cloze(record, record.text("question"), list(choices.texts), gold, str(source))


def _cloze(record: TaskRecord, question: str, choices: list[str], gold: int, source: str) -> Question:
    if not question.strip() or not all(choice.strip() for choice in choices):
        raise UserError(f"{record.where}: the question or one of its choices is empty; complete or delete the record.")
    return Question(source, f"Question: {question}\nAnswer:", tuple(choices), gold)


def _options(record: TaskRecord) -> Choices:
    choices = gather_choices(record).get("choices") or record["choices"]
    try:
        return read_choices({"choices": choices}, "choices")
    except Malformed as error:
        raise UserError(f"{record.where}: {error}.") from None


def _gold(record: TaskRecord, choices: Choices, first_choice: int | None) -> int:
    """Return the index of the right choice, which records give by number, letter, label, text or truth value."""
    index = right_choice(record["answer"], choices, first_choice)
    if index is None:
        raise record.field_error("answer", describe_answers(record["answer"], choices, first_choice))
    return index


def check_first_choice(records: Sequence[TaskRecord], form: Form, first_choice: int | None) -> None:
    """Raise ``UserError`` if every answer of many is a number and none is the first choice's."""
    answers = [str(record.get("answer")) for record in records]
    if form not in ("mmlu", "generic") or first_choice is not None or len(answers) < MANY_ANSWERS:
        return
    if all(answer.isdigit() for answer in answers) and "0" not in answers:
        raise UserError(
            f"{records[0].where}: none of {len(answers)} answers is 0, so the numbers seem to count from 1. Write "
            "first_choice: 1, or 0 if they do not."
        )


def _truthfulqa(record: TaskRecord) -> Question:
    """Parse the Hub's ``multiple_choice`` records with two lists of targets, or best, correct and incorrect answers.

    From answers, MC1 is the best one against all incorrect ones, MC2 all correct against all incorrect ones.
    """
    fields = TaskRecord(record.where, {name.strip().lower().replace(" ", "_"): value for name, value in record.items()})
    if "mc1_targets" in fields or "mc2_targets" in fields:
        mc1, mc2 = (_targets(fields, name) for name in ("mc1_targets", "mc2_targets"))
    else:
        wrong = [(text, False) for text in _answers(fields, "incorrect_answers")]
        mc1 = [(fields.text("best_answer").strip(), True), *wrong]
        mc2 = [*((text, True) for text in _answers(fields, "correct_answers")), *wrong]
    if sum(is_true for _, is_true in mc1) != 1 or len({is_true for _, is_true in mc2}) != 2:
        raise UserError(
            f"{record.where}: expected one true answer among MC1's and both true and false ones among MC2's; found "
            f"{sum(is_true for _, is_true in mc1)} of {len(mc1)} and {sum(is_true for _, is_true in mc2)} of "
            f"{len(mc2)}."
        )
    # An answer may be in both lists; it is read once, and referred to by its index.
    choices = list(dict.fromkeys(text for text, _ in (*mc1, *mc2)))
    examples = [f"Q: {example.question}\nA: {example.answer}" for example in TRUTHFUL_EXAMPLES]
    return Question(
        source=str(fields.get("category") or "truthfulqa"),
        context="\n\n".join([*examples, f"Q: {fields.text('question')}\nA:"]),
        choices=tuple(choices),
        gold=[is_true for _, is_true in mc1].index(True),
        rivals=tuple(choices.index(text) for text, _ in mc1),
        truths=tuple((choices.index(text), is_true) for text, is_true in mc2),
    )


def _targets(record: TaskRecord, name: str) -> list[tuple[str, bool]]:
    value = record[name]
    if not isinstance(value, dict):
        raise record.field_error(name, "a mapping of choices and labels, as in truthfulqa/truthful_qa")
    inner = TaskRecord(f"{record.where}: {name}", value)
    texts = inner.texts("choices")
    labels = inner["labels"]
    if not isinstance(labels, list) or len(labels) != len(texts) or not set(labels) <= {0, 1}:
        raise inner.field_error("labels", f"{len(texts)} labels, each 0 or 1")
    return [(text, bool(label)) for text, label in zip(texts, labels, strict=True)]


def _answers(record: TaskRecord, name: str) -> list[str]:
    """Return answers given as a list, or as a text with semicolons between them, as in the benchmark's CSV file."""
    value = record[name]
    texts = record.text(name).split(";") if isinstance(value, str) else record.texts(name)
    return [text.strip() for text in texts if text.strip()]


def _has(*names: str) -> Callable[[TaskRecord], bool]:
    return lambda record: {name.lower().replace(" ", "_") for name in record} >= set(names)


def _is_instruction(record: TaskRecord) -> bool:
    return bool(re.search(r"\banswer\s?2:", str(record.get("instruction", "")), re.IGNORECASE)) and "answer" in record


def _is_arc(record: TaskRecord) -> bool:
    return _is_instruction(record) or ("answerKey" in record and isinstance(record.get("choices"), dict))


def _is_truthfulqa(record: TaskRecord) -> bool:
    targets = _has("question", "mc1_targets", "mc2_targets")(record)
    return targets or _has("question", "best_answer", "correct_answers", "incorrect_answers")(record)


def _is_generic(record: TaskRecord) -> bool:
    has_choices = gather_choices(record).get("choices") is not None
    return has_choices and "question" in record and "answer" in record


_DETECTORS: tuple[tuple[Form, Callable[[TaskRecord], bool], str], ...] = (
    ("arc", _is_arc, "its records have ARC's answerKey, or numbered answers in an instruction"),
    ("truthfulqa", _is_truthfulqa, "its records have TruthfulQA's lists of true and false answers"),
    ("mmlu", lambda record: _is_generic(record) and "subject" in record, "its records have MMLU's choices and subject"),
    ("generic", _is_generic, "its records have question, choices and answer"),
)
_PARSERS: dict[Form, Callable[[TaskRecord], Question]] = {"arc": _arc, "truthfulqa": _truthfulqa}
_PARSERS_WITH_NUMBERS: dict[Form, Callable[[TaskRecord, int | None], Question]] = {"mmlu": _mmlu, "generic": _generic}
