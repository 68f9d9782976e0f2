"""Spellings of multiple choice: what each record asks, and what a user reads whose record does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config.recipe.source_settings import FilesSource
from align.evaluation.tasks.choice_formats import TRUTHFUL_EXAMPLES, Form, Question, choose_form, parse
from align.evaluation.tasks.records import TaskRecord, read_records
from tests.support.refusals import Refused

HUB_ARC = {
    "id": "X_1",
    "question": "Which melts?",
    "choices": {"text": ["ice", "iron", "oak"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
LOCAL_ARC = {
    "instruction": "Please choose the correct answer to the question: Which melts?\n\nAnswer1: ice Answer2: iron "
    "Answer3: oak\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
MMLU = {"question": "  Which metal? ", "choices": ["tin", "oak"], "answer": 0, "subject": "high_school_physics"}
GENERIC = {"question": "Which?", "choices": ["a thing", "another"], "answer": 1}
TARGETS = {
    "question": "Is it?",
    "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["No", "Not at all", "Yes", "Sure"], "labels": [1, 1, 0, 0]},
}
CSV = {
    "Type": "Adversarial",
    "Category": "Law",
    "Question": "Is it?",
    "Best Answer": "No",
    "Correct Answers": "Not at all; No; ",
    "Incorrect Answers": "Yes; Sure",
    "Source": "",
}
LISTS = {
    "question": "Is it?",
    "category": "Law",
    "best_answer": "No",
    "correct_answers": ["Not at all", "No"],
    "incorrect_answers": ["Yes", "Sure"],
}


def record(fields: dict[str, Any]) -> TaskRecord:
    return TaskRecord("a.jsonl:3", fields)


def ask(fields: dict[str, Any], form: Any = "auto") -> Question:
    chosen, _ = choose_form([record(fields)], form)
    return parse(record(fields), chosen)


def test_arc_from_the_hub_and_as_an_instruction_ask_the_same() -> None:
    question = ask(HUB_ARC)
    assert question.context == "Question: Which melts?\nAnswer:"
    assert question.choices == ("ice", "iron", "oak")
    assert (question.gold, question.answer, question.source) == (1, "iron", "arc")
    assert ask(LOCAL_ARC) == question


def test_arc_with_numbers_for_labels() -> None:
    numbered = {**HUB_ARC, "choices": {"text": ["ice", "iron"], "label": ["1", "2"]}, "answerKey": "2"}
    assert ask(numbered).gold == 1


def test_a_number_inside_a_choice_is_no_choice() -> None:
    text = "Which?\n\nAnswer1: see Answer3: above Answer2: the answer: 42"
    question = ask({"instruction": text, "answer": "Answer 1"})
    assert question.choices == ("see Answer3: above", "the answer: 42")
    assert question.context == "Question: Which?\nAnswer:"


def test_mmlu_asks_for_letters_under_its_subject() -> None:
    question = ask(MMLU)
    assert question.context == "Which metal?\nA. tin\nB. oak\nAnswer:"
    assert question.choices == ("A", "B")
    assert question.answer == "A"
    assert question.source == "high school physics"
    assert question.description == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
    )


@pytest.mark.parametrize("answer", [1, "another", "B", " b "])
def test_one_s_own_answers_may_be_numbers_texts_or_letters(answer: Any) -> None:
    question = ask({**GENERIC, "answer": answer, "category": "trivia"})
    assert question.gold == 1
    assert question.source == "trivia"
    assert question.context == "Question: Which?\nAnswer:"


def test_the_text_of_a_choice_comes_before_its_letter() -> None:
    assert ask({"question": "?", "choices": ["B", "A"], "answer": "A"}).gold == 1


def test_truthfulqa_by_targets() -> None:
    question = ask(TARGETS)
    assert question.choices == ("No", "Yes", "Not at all", "Sure")
    assert (question.rivals, question.gold, question.answer) == ((0, 1), 0, "No")
    assert question.truths == ((0, True), (2, True), (1, False), (3, False))
    assert question.context.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert question.context.endswith("held in Barcelona, Spain.\n\nQ: Is it?\nA:")
    assert question.context.count("\n\nQ: ") == len(TRUTHFUL_EXAMPLES) == 6


@pytest.mark.parametrize("fields", [CSV, LISTS])
def test_truthfulqa_by_answers(fields: dict[str, Any]) -> None:
    question = ask(fields)
    assert [question.choices[index] for index in question.rivals] == ["No", "Yes", "Sure"]
    assert [(question.choices[index], true) for index, true in question.truths] == [
        ("Not at all", True), ("No", True), ("Yes", False), ("Sure", False),
    ]  # fmt: skip
    assert question.source == "Law"


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        (HUB_ARC, "arc"),
        (LOCAL_ARC, "arc"),
        (MMLU, "mmlu"),
        (GENERIC, "generic"),
        (TARGETS, "truthfulqa"),
        (CSV, "truthfulqa"),
        (LISTS, "truthfulqa"),
    ],
)
def test_auto_says_what_it_chose_and_why(fields: dict[str, Any], form: str) -> None:
    assert choose_form([record(fields)], "auto")[0] == form
    assert choose_form([record(fields)], "auto")[1].startswith("its records have")
    assert choose_form([record(fields)], "generic") == ("generic", "")


def test_auto_needs_every_record_to_fit(refused: Refused) -> None:
    refused(lambda: choose_form([record(HUB_ARC), record(GENERIC)], "auto"))


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({**HUB_ARC, "answerKey": "D"}, "arc"),
        ({**HUB_ARC, "choices": {"text": ["ice"], "label": ["A", "B"]}}, "arc"),
        ({**HUB_ARC, "choices": ["ice", "iron"]}, "arc"),
        ({**HUB_ARC, "choices": {"text": ["ice", " "], "label": ["A", "B"]}}, "arc"),
        ({"instruction": "Which?", "answer": "answer1"}, "arc"),
        ({**LOCAL_ARC, "answer": "answer4"}, "arc"),
        ({"question": "?"}, "generic"),
        ({**GENERIC, "answer": 2}, "generic"),
        ({**GENERIC, "answer": True}, "generic"),
        ({**GENERIC, "answer": "1"}, "generic"),
        ({**GENERIC, "choices": ["one"]}, "generic"),
        ({**GENERIC, "question": " "}, "generic"),
        ({**MMLU, "subject": ""}, "mmlu"),
        ({**TARGETS, "mc1_targets": [1]}, "truthfulqa"),
        ({**TARGETS, "mc1_targets": {"choices": ["No", "Yes"], "labels": [1]}}, "truthfulqa"),
        ({**TARGETS, "mc2_targets": {"choices": ["No", "Yes"], "labels": [1, 1]}}, "truthfulqa"),
        ({**TARGETS, "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 1]}}, "truthfulqa"),
        ({**CSV, "Incorrect Answers": ""}, "truthfulqa"),
    ],
)
def test_a_record_that_does_not_fit_is_named(refused: Refused, fields: dict[str, Any], form: Any) -> None:
    refused(ask, fields, form)


def test_all_of_arc_easy_is_understood(shared_data: Path) -> None:
    records = read_records(FilesSource(type="files", paths=[str(shared_data / "arc/ARC-Easy.test.json")]), Path())
    assert choose_form(records, "auto")[0] == "arc"
    questions = [parse(each, "arc") for each in records]
    assert len({question.id for question in questions}) == 2376
    for record, question in zip(records, questions, strict=True):
        question_text = question.context.removeprefix("Question: ").removesuffix("\nAnswer:")
        numbered = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(question.choices, 1))
        names = "/".join(f"answer{number}" for number in range(1, len(question.choices) + 1))
        assert record["instruction"] == (
            f"Please choose the correct answer to the question: {question_text}\n\n{numbered}\n\nAnswer format: {names}"
        )
        assert record["answer"] == f"answer{question.gold + 1}"


def test_all_of_truthfulqa_is_understood(shared_data: Path) -> None:
    records = read_records(FilesSource(type="files", paths=[str(shared_data / "truthfulqa/TruthfulQA.csv")]), Path())
    assert choose_form(records, "auto")[0] == "truthfulqa"
    questions = [parse(each, "truthfulqa") for each in records]
    assert len({question.id for question in questions}) == 817
    for record, question in zip(records, questions, strict=True):
        assert question.answer == record["Best Answer"].strip()
        assert [true for _, true in question.truths].count(True) >= 1
        rivals = {question.choices[index] for index in question.rivals}
        assert rivals - {question.answer} == {
            question.choices[index] for index, true in question.truths if not true
        }  # MC1 has every false answer of MC2


@pytest.mark.parametrize("question", ["Plain?", " a", "a ", "a\n", "\ta \n", "It is ____", "It is ____ "])
def test_blanks_of_questions_are_those_of_lm_eval(question: str) -> None:
    """lm-eval's template of MMLU strips the question, and no choice; those of ARC and TruthfulQA strip nothing."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.utils import apply_template

    choices = [" b", "c ", "d\n", "e"]
    targets = {"choices": choices, "labels": [1, 0, 0, 0]}
    tasks: dict[Form, tuple[str, dict[str, Any]]] = {
        "mmlu": ("mmlu/default/_default_template_yaml", {"choices": choices, "answer": 1, "subject": "law"}),
        "arc": ("arc/arc_easy.yaml", {"choices": {"text": choices, "label": ["A", "B", "C", "D"]}, "answerKey": "B"}),
        "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", {"mc1_targets": targets, "mc2_targets": targets}),
    }
    for form, (file, fields) in tasks.items():
        text = (Path(lm_eval.__file__).parent / "tasks" / file).read_text(encoding="utf-8")
        template = yaml.safe_load(re.sub("!function .*", "null", text))["doc_to_text"]
        record = {"question": question, **fields}
        parsed = parse(TaskRecord("x:1", record), form)
        assert parsed.context == apply_template(template, record)
        assert form == "mmlu" or list(parsed.choices) == choices
