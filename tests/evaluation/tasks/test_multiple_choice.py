"""Multiple choice: scores by hand, what is read, shots, and a real model beside a plain loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.config.base import Config
from align.config.stages.evaluation.tasks import MultipleChoiceConfig
from align.config.validation import validate
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task, task_identities
from align.evaluation.tasks import multiple_choice as module
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.choice_formats import Question
from align.evaluation.tasks.multiple_choice import MultipleChoiceTask, is_tie, score
from align.evaluation.tasks.records import record_source
from tests.support.evaluation.tasks.readers import ModelReader, RuleReader
from tests.support.refusals import Refused

ARC = [
    {"question": f"Which {word}?", "choices": {"text": ["ice", "iron"], "label": ["A", "B"]}, "answerKey": key}
    for word, key in (("melts", "A"), ("sinks", "B"), ("burns", "A"))
]
SOLVED = [{**ARC[0], "question": f"What {number}?"} for number in range(3)]
MMLU = [
    {"question": f"{subject} {number}?", "choices": ["x", "y"], "answer": number % 2, "subject": subject}
    for subject in ("bird_law", "maths")
    for number in range(2)
]
DEV = [{**record, "question": f"dev {record['question']}"} for record in MMLU]


def task_inputs(base: Path, seed: int = 0) -> TaskInputs:
    return TaskInputs(seed, base, [], False, "float32", lambda message: None, print)


def build(folder: Path, records: list[dict[str, Any]], solved: Any = None, **settings: Any) -> MultipleChoiceTask:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if solved is not None:
        (folder / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in solved))
        settings["examples_files"] = ["dev.jsonl"]
    return build_task("quiz", MultipleChoiceConfig(files=["a.jsonl"], **settings), task_inputs(folder))


def prompted(shots: int = 0, system: str = "") -> SystemInfo:
    return SystemInfo("prompted", "model", "prompted", "k2", system, shots)


def of(*choices: str, gold: int = 0, **more: Any) -> Question:
    return Question("s", "Q:", choices, gold, **more)


def test_sum_and_per_character_by_hand() -> None:
    # -4 over 2 characters is -2 each, -6 over 8 is -0.75 each: the sum prefers the first, the mean the second.
    question = of("aa", "aaaaaaaa", gold=1)
    assert score(question, [-4.0, -6.0]) == {"acc": 0.0, "acc_norm": 1.0}
    assert score(of("aa", "aaaaaaaa", gold=0), [-4.0, -6.0]) == {"acc": 1.0, "acc_norm": 0.0}


def test_characters_are_counted_and_not_bytes() -> None:
    # "éé" has 2 characters and 4 bytes: -4/2 = -2 against -5/3 = -1.67; by bytes it would be -1.
    assert score(of("éé", "abc", gold=1), [-4.0, -5.0])["acc_norm"] == 1.0


def test_of_equal_choices_the_first_counts_and_ties_are_counted() -> None:
    assert score(of("a", "b", gold=0), [-1.0, -1.0]) == {"acc": 1.0, "acc_norm": 1.0}
    assert score(of("a", "b", gold=1), [-1.0, -1.0]) == {"acc": 0.0, "acc_norm": 0.0}
    assert is_tie(of("a", "b"), [-1.0, -1.0])
    assert not is_tie(of("a", "b", "c"), [-1.0, -2.0, -2.0])


def test_truthfulqa_by_hand() -> None:
    truths = ((0, True), (2, True), (1, False))
    question = of("no", "yes", "never", rivals=(0, 1), truths=truths)
    logprobs = [math.log(value) for value in (0.2, 0.3, 0.5)]
    measured = score(question, logprobs)
    assert measured["mc1"] == 0.0, "'yes' is likelier than 'no', and 'never' is no rival"
    assert measured["mc2"] == pytest.approx(0.7 / 1.0)
    # An answer that is written twice has its share twice, as in lm-eval: 1.2 of 1.5.
    twice = of("no", "yes", "never", rivals=(0, 1), truths=(*truths, (2, True)))
    assert score(twice, logprobs)["mc2"] == pytest.approx(1.2 / 1.5)
    assert score(question, [math.log(0.4), math.log(0.3), math.log(0.3)])["mc1"] == 1.0


def test_improbable_answers_still_have_shares() -> None:
    question = of("no", "yes", rivals=(0, 1), truths=((0, True), (1, False)))
    # exp(-2000) is 0 in any float; 1 against e: 1 / (1 + e)
    assert score(question, [-2001.0, -2000.0])["mc2"] == pytest.approx(1 / (1 + math.e))


def test_what_is_read_and_what_comes_of_it(tmp_path: Path) -> None:
    task = build(tmp_path, ARC)
    reader = RuleReader(lambda context, answer: -1.0 if answer == " ice" else -1.5)
    measured = task.read(reader)
    assert reader.asked[:2] == [
        ("Question: Which melts?\nAnswer:", " ice"), ("Question: Which melts?\nAnswer:", " iron"),
    ]  # fmt: skip
    assert task.read_choices(reader)["logprobs"] == [pytest.approx([-1.0, -1.5])] * 3
    assert measured.values["acc"] == [[1.0], [0.0], [1.0]]
    # -1 over 3 characters is -0.333, -1.5 over 4 is -0.375
    assert measured.values["acc_norm"] == [[1.0], [0.0], [1.0]]
    assert measured.notes == {"ties": 0, "inputs_cut": 0}
    assert list(measured.values) == list(task.metrics) == ["acc", "acc_norm"]
    assert task.primary == "acc"
    assert [item.source for item in task.items] == ["arc"] * 3
    assert task.items[0].data["choices"] == ["ice", "iron"]


def test_examples_and_system_text_precede_question(tmp_path: Path) -> None:
    task = build(tmp_path, ARC, SOLVED, shots=2)
    reader = RuleReader(lambda context, answer: 0.0)
    task.read(reader)
    two = "Question: What 0?\nAnswer: ice\n\nQuestion: What 1?\nAnswer: ice\n\n"
    assert reader.asked[0][0] == two + "Question: Which melts?\nAnswer:"
    second = RuleReader(lambda context, answer: 0.0, prompted(shots=1, system="Be brief."))
    task.read(second)
    shot = "Question: What 0?\nAnswer: ice\n\n"
    assert second.asked[0][0] == f"Be brief.\n\n{shot}Question: Which melts?\nAnswer:", "its own shots, not the task's"
    without = RuleReader(lambda context, answer: 0.0, prompted(system="Be brief."))
    task.read(without)
    assert without.asked[0][0] == f"Be brief.\n\n{two}Question: Which melts?\nAnswer:"
    assert [example.answer for example in task.examples(2)] == ["ice", "ice"]
    assert task.examples(1)[0].question == "Question: What 0?\nAnswer:"


def test_mmlu_shows_examples_of_the_question_s_subject(tmp_path: Path) -> None:
    task = build(tmp_path, MMLU, DEV, shots=1)
    reader = RuleReader(lambda context, answer: 0.0)
    measured = task.read(reader)
    assert reader.asked[-1] == (
        "The following are multiple choice questions (with answers) about maths.\n\n"
        "dev maths 0?\nA. x\nB. y\nAnswer: A\n\n"
        "maths 1?\nA. x\nB. y\nAnswer:",
        " B",
    )
    assert list(measured.values) == ["acc"]
    assert [item.source for item in task.items] == ["bird law", "bird law", "maths", "maths"]


def test_truthfulqa_s_own_examples_are_shown_to_every_system(tmp_path: Path) -> None:
    record = {"question": "Is it?", "best_answer": "No", "correct_answers": ["No"], "incorrect_answers": ["Yes"]}
    task = build(tmp_path, [record])
    reader = RuleReader(lambda context, answer: math.log(0.6) if answer == " No" else math.log(0.2), prompted(shots=2))
    measured = task.read(reader)
    assert measured.values == {"mc1": [[1.0]], "mc2": [[pytest.approx(0.75)]]}
    assert reader.asked[0][0].count("\nA:") == 7
    assert task.primary == "mc2"
    assert len(task.examples(9)) == 6


def test_as_a_conversation_the_answer_is_the_assistant_s(tmp_path: Path) -> None:
    task = build(tmp_path, MMLU, DEV, shots=1, chat=True)
    reader = RuleReader(lambda context, answer: 0.0)
    task.read(reader)
    assert reader.asked[0] == (
        "<|im_start|>user\nThe following are multiple choice questions (with answers) about bird law.\n\n"
        "dev bird_law 0?\nA. x\nB. y\nAnswer:<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nbird_law 0?\nA. x\nB. y\nAnswer:<|im_end|>\n<|im_start|>assistant\n",
        "A",
    )
    reader = RuleReader(lambda context, answer: 0.0, prompted(shots=1, system="Be brief."))
    task.read(reader)
    assert reader.asked[0][0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ndev bird_law 0?")
    assert reader.asked[0][0].count("dev bird_law 0?") == 1, "its own shots take the place of the task's"
    assert reader.asked[-1][0].count("dev maths 0?") == 1


def test_a_choice_in_a_conversation_has_all_its_tokens(tmp_path: Path) -> None:
    task = build(tmp_path, ARC, chat=True)
    reader = RuleReader(lambda context, answer: -float(len(answer)))
    assert task.read_choices(reader)["logprobs"] == [pytest.approx([-3.0, -4.0])] * 3
    assert {answer for _, answer in reader.asked} == {"ice", "iron"}


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_s_choices_are_those_of_a_plain_loop(tmp_path: Path, tiny_model: Path, chat: bool) -> None:
    task = build(tmp_path, ARC, chat=chat)
    reader = ModelReader(tiny_model)
    logprobs = task.read_choices(reader)["logprobs"]
    for item, values in zip(task.items, logprobs, strict=True):
        text = item.prompt[0]["content"]
        for choice, value in zip(item.data["choices"], values, strict=True):
            if chat:
                text_ids = reader.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
                answer = reader.tokenizer.encode(choice)
            else:
                text_ids, answer = reader.tokenizer.encode(text), reader.tokenizer.encode(f" {choice}")
            assert value == pytest.approx(reader.by_plain_loop(text_ids, answer), abs=1e-4)
    best = [max(range(2), key=values.__getitem__) for values in logprobs]
    gold = [0, 1, 0]
    assert [row[0] for row in task.read(reader).values["acc"]] == [
        float(a == b) for a, b in zip(best, gold, strict=True)
    ]


def test_what_was_read_is_kept_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    task = build(tmp_path, ARC, SOLVED, shots=1)
    reader = RuleReader(lambda context, answer: -float(len(answer)))
    first = task.read(reader)
    assert reader.computed == ["quiz-0", "quiz-2"]
    assert task.read(reader) == first
    assert reader.computed == ["quiz-0", "quiz-2"], "the second time nothing is read"
    two_shot_task = build(tmp_path, ARC, SOLVED, shots=2)
    two_shot_task.read(reader)
    assert reader.computed == ["quiz-0", "quiz-2"] * 2, "other contexts are other results"
    reader.max_length = 10
    two_shot_task.read(reader)
    assert reader.computed == ["quiz-0", "quiz-2"] * 3, "and so are contexts that are cut"


def test_long_context_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    task = build(tmp_path, ARC)
    reader = RuleReader(lambda context, answer: 0.0)
    reader.max_length = 20
    measured = task.read(reader)
    assert measured.notes["inputs_cut"] == 6
    context, answer = reader.asked[0]
    assert len(context) + len(answer) == 21, "a byte a token: the last one is no input"
    assert "Question: Which melts?\nAnswer:".endswith(context)


def test_numbers_that_are_none_are_refused(refused: Refused, tmp_path: Path) -> None:
    task = build(tmp_path, ARC)
    refused(lambda: task.read(RuleReader(lambda context, answer: math.nan)))


def test_questions_are_none_of_the_examples(tmp_path: Path) -> None:
    task = build(tmp_path, ARC, [ARC[0], SOLVED[0]], shots=1)
    reader = RuleReader(lambda context, answer: 0.0)
    task.read(reader)
    assert reader.asked[0][0].startswith("Question: What 0?")


def test_a_question_that_is_there_twice_has_two_ids(tmp_path: Path) -> None:
    ids = [item.id for item in build(tmp_path, [ARC[0], ARC[0], ARC[1]]).items]
    assert len(set(ids)) == 3
    assert ids[1] == f"{ids[0]}-2"


def test_too_few_examples_are_an_error_before_anything_is_read(refused: Refused, tmp_path: Path) -> None:
    refused(build, tmp_path, ARC, SOLVED, shots=4)
    refused(lambda: build(tmp_path, MMLU, DEV[:3], shots=2))
    task = build(tmp_path, ARC)
    for ask in (
        lambda: task.read(RuleReader(lambda context, answer: 0.0, prompted(1))),
        lambda: task.check(prompted(1)),
    ):
        refused(ask)
    task.check(prompted())
    build(tmp_path, ARC, chat=True).check(prompted(1))  # in a conversation, the system may have its own


@pytest.mark.parametrize(
    "settings",
    [
        {"files": ["a.jsonl"], "shots": 1},
        {"files": ["a"], "examples_split": "dev"},
        {"format": "mmlu", "revision": "0" * 40, "examples_split": "dev", "examples_files": ["b"]},
        {"files": ["a"], "format": "truthfulqa", "shots": 1},
        {"files": ["a"], "format": "ark"},
        {"shots": 0},
        {"format": "mmlu"},
    ],
)
def test_settings_that_cannot_be_meant_are_explained(refused: Refused, settings: dict[str, Any]) -> None:
    config: type[Config] = MultipleChoiceConfig
    refused(validate, config, settings, "e.yaml: tasks.quiz")


def test_shots_for_truthfulqa_that_auto_finds_are_refused_too(refused: Refused, tmp_path: Path) -> None:
    record = {"question": "Is it?", "best_answer": "No", "correct_answers": ["No"], "incorrect_answers": ["Yes"]}
    refused(build, tmp_path, [record], [{**record, "question": "Was it?"}], shots=1)


def test_the_hub_s_usual_places() -> None:
    commit = "0" * 40
    places = {
        form: record_source(MultipleChoiceConfig(format=form, revision=commit))
        for form in ("arc", "mmlu", "truthfulqa")
    }
    actual = {form: (source.dataset, source.config, source.split) for form, source in places.items()}  # type: ignore[union-attr]
    assert actual == {
        "arc": ("allenai/ai2_arc", "ARC-Easy", "test"),
        "mmlu": ("cais/mmlu", "all", "test"),
        "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    }


def test_examples_enter_the_identity_by_content(tmp_path: Path) -> None:
    config = build(tmp_path, ARC, SOLVED, shots=1).config
    before = task_identities(config, tmp_path)
    assert set(before) == {"a.jsonl", "examples: dev.jsonl"}
    (tmp_path / "dev.jsonl").write_text("{}\n")
    assert task_identities(config, tmp_path) != before
    assert {"files", "examples_files"} <= config.identified


def test_settings_say_how_it_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = build(tmp_path, ARC, SOLVED, shots=1).settings()
    assert capsys.readouterr().out.startswith("quiz: format arc: its records have ARC's answerKey")
    assert settings["format"] == "arc"
    assert settings["asked_as"] == "plain text"
    assert settings["first_context"] == "Question: What 0?\nAnswer: ice\n\nQuestion: Which melts?\nAnswer:"
    assert json.dumps(settings)


def test_two_hundred_questions_of_arc_easy(shared_data: Path) -> None:
    config = MultipleChoiceConfig(files=[str(shared_data / "arc/ARC-Easy.test.json")], max_items=200)
    task = build_task("arc", config, task_inputs(Path()))
    assert len(task.items) == 200
    # A rule that needs no model: the longest answer.
    reader = RuleReader(lambda context, answer: float(len(answer)))
    right = [row[0] for row in task.read(reader).values["acc"]]
    longest = [max(question.choices, key=len) == question.answer for question in task.questions]
    assert right == [float(value) for value in longest]
