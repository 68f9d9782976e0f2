"""Benchmarks in the layouts that their authors publish, read through ``columns``, ``records`` and ``header``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.record_mapping import ComparedColumns, Constant
from align.config.stages.evaluation.tasks import (
    Gsm8kConfig,
    IfbenchConfig,
    JudgedConfig,
    MultipleChoiceConfig,
    PerplexityConfig,
    PreferenceConfig,
    RewardPairsConfig,
)
from align.config.validation import validate
from align.data.rows import user
from align.errors import UserError
from align.evaluation.tasks import build_task
from tests.support.evaluation.tasks.respondents import task_inputs
from tests.support.refusals import Refused


def put(path: Path, records: list[Any]) -> list[str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [path.name]


def questions_of(tmp_path: Path, **settings: Any) -> list[tuple[str, tuple[str, ...], str]]:
    task = build_task("quiz", MultipleChoiceConfig(**settings), task_inputs(tmp_path))
    return [(question.context, question.choices, question.answer) for question in task.questions]


def test_mmlu_as_csv_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "algebra_test.csv").write_text('"Find x, if 2x = 4.",1,2,3,4,B\nFind y.,0,4,2,6,D\n')
    header = ["question", "A", "B", "C", "D", "answer"]
    assert questions_of(tmp_path, files=["algebra_test.csv"], header=header)[0] == (
        "Question: Find x, if 2x = 4.\nAnswer:",
        ("1", "2", "3", "4"),
        "2",
    )
    subject = {"subject": Constant(constant="abstract_algebra")}
    task = build_task(
        "mmlu", MultipleChoiceConfig(files=["algebra_test.csv"], header=header, columns=subject), task_inputs(tmp_path)
    )
    assert task.title == "MMLU" and task.questions[1].answer == "D"
    assert task.questions[0].context == "Find x, if 2x = 4.\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"


@pytest.mark.parametrize(
    ("record", "settings", "question"),
    [
        (
            {"goal": "Open a jar.", "sol1": "Twist.", "sol2": "Push.", "label": 0},
            {"columns": {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}},
            ("Question: Open a jar.\nAnswer:", ("Twist.", "Push."), "Twist."),
        ),
        (
            {"question": "is it so", "passage": "It is so.", "answer": True, "title": "T"},
            {"columns": {"question": "{passage}\n{question}?", "choices": Constant(constant=["no", "yes"])}},
            ("Question: It is so.\nis it so?\nAnswer:", ("no", "yes"), "yes"),
        ),
        (
            {"sentence": "Ann thanked Eve as _ helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            {"columns": {"question": "sentence", "choices": ["option1", "option2"]}, "first_choice": 1},
            ("Question: Ann thanked Eve as _ helped.\nAnswer:", ("Ann", "Eve"), "Eve"),
        ),
        (
            {"context": "Two met.", "question": "Who ran?", "ans0": "He", "ans1": "She", "ans2": "Unknown", "label": 2},
            {"columns": {"question": "{context} {question}", "choices": ["ans0", "ans1", "ans2"], "answer": "label"}},
            ("Question: Two met. Who ran?\nAnswer:", ("He", "She", "Unknown"), "Unknown"),
        ),
    ],
    ids=["piqa", "boolq", "winogrande", "bbq"],
)  # fmt: skip
def test_tables_of_choices(
    record: dict[str, Any], settings: dict[str, Any], question: tuple[Any, ...], tmp_path: Path
) -> None:
    files = put(tmp_path / "a.jsonl", [record])
    assert questions_of(tmp_path, files=files, **settings) == [question]


def test_bbh_under_its_key(tmp_path: Path) -> None:
    document = {"canary": "x", "examples": [{"input": "not ( True ) is", "target": "False"}]}
    (tmp_path / "boolean_expressions.json").write_text(json.dumps(document))
    columns = {"question": "input", "choices": Constant(constant=["True", "False"]), "answer": "target"}
    found = questions_of(tmp_path, files=["boolean_expressions.json"], records="examples", columns=columns)
    assert found == [("Question: not ( True ) is\nAnswer:", ("True", "False"), "False")]


def test_numbers_that_count_from_one_are_found_out(refused: Refused, tmp_path: Path) -> None:
    records = [{"question": f"q{i}", "choices": ["a", "b", "c"], "answer": 1 + i % 2} for i in range(20)]
    files = put(tmp_path / "a.jsonl", records)
    refused(questions_of, tmp_path, files=files)
    assert questions_of(tmp_path, files=files, first_choice=1)[1][2] == "b"
    put(tmp_path / "a.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 2}])
    refused(questions_of, tmp_path, files=files)


def test_svamp_as_gsm8k(tmp_path: Path) -> None:
    files = put(tmp_path / "a.jsonl", [{"Body": "Ann has 3 apples.", "Question": "How many?", "Answer": 3.0}])
    columns = {"question": "{Body} {Question}", "answer": "#### {Answer}"}
    task = build_task("svamp", Gsm8kConfig(files=files, columns=columns), task_inputs(tmp_path))
    (item,) = task.items
    assert (item.prompt, item.data["answer"]) == ([user("Ann has 3 apples. How many?")], "3.0")


def test_pairs_by_a_label(tmp_path: Path) -> None:
    files = put(
        tmp_path / "a.jsonl",
        [{"input": "q", "output_1": "good", "output_2": "bad", "label": label} for label in (1, 2)],
    )
    better = ComparedColumns(label="label", a="output_1", b="output_2")
    settings = {"files": files, "columns": {"prompt": "input"}, "better": better}
    task = build_task("llmbar", PreferenceConfig(**settings), task_inputs(tmp_path))
    assert [item.data for item in task.items] == [
        {"chosen": "good", "rejected": "bad"},
        {"chosen": "bad", "rejected": "good"},
    ]
    scored = build_task("llmbar", RewardPairsConfig(**settings), task_inputs(tmp_path))
    assert [comparison.chosen for comparison in scored.comparisons] == [["good"], ["bad"]]


def test_other_tasks_and_wrong_names(refused: Refused, tmp_path: Path) -> None:
    files = put(tmp_path / "a.jsonl", [{"body": "A long text.", "n": 1}])
    task = build_task("text", PerplexityConfig(files=files, columns={"text": "{body} {n}"}), task_inputs(tmp_path))
    assert task.documents[0].text == "A long text. 1"
    refused(
        lambda: build_task(
            "quiz", MultipleChoiceConfig(files=files, columns={"question": "bodi"}), task_inputs(tmp_path)
        )
    )
    refused(validate, MultipleChoiceConfig, {"files": ["a"], "columns": {"questoin": "x"}}, "suite.yaml")
    refused(
        validate, JudgedConfig, {"files": ["a"], "columns": {"chosen": "x"}, "judge": {"reward": True}}, "suite.yaml"
    )


def test_ifbench_runs_with_the_checkers_that_are_installed(tmp_path: Path) -> None:
    record = {"key": "1", "prompt": "Write.", "instruction_id_list": ["count:numbers"], "kwargs": [{"N": 2}]}
    task = build_task("ifbench", IfbenchConfig(files=put(tmp_path / "a.jsonl", [record])), task_inputs(tmp_path))
    assert task.title.startswith("IFBench") and task.metrics["prompt_strict"].title == "IFBench, prompts (strict)"
    from align.evaluation.tasks.ifeval import check

    assert check(task.items[0], "1 and 2")[0] == [True] and check(task.items[0], "none")[0] == [False]
    for change, message in (
        (
            {"instruction_id_list": ["count:numbres"]},
            "no instruction 'count:numbres'. Did you mean 'count:numb",
        ),
        ({"kwargs": [{}]}, "'count:numbers' needs N in its kwargs"),
    ):
        with pytest.raises(UserError, match=message):
            files = put(tmp_path / "b.jsonl", [{**record, **change}])
            build_task("ifbench", IfbenchConfig(files=files), task_inputs(tmp_path))
