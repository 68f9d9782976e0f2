"""Our IFEval and ARC beside lm-eval's own, on the same answers and the same checkpoint: equal numbers, item by item.

IFEval: the 541 prompts of the real set. Two of them (1122, 1129) are left out, and it is tested why: lm-eval counts a
letter that it draws at random where they ask for a sign. langdetect guesses at random unless seeded, so both are
seeded alike.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.tasks import IfevalConfig, MultipleChoiceConfig
from align.errors import UserError
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.ifeval import IfevalTask, check
from align.evaluation.tasks.multiple_choice import MultipleChoiceTask
from align.verifiers.instructions import seeded_language_guess
from tests.support.evaluation.tasks.ifeval_answers import KINDS
from tests.support.evaluation.tasks.readers import ModelReader
from tests.support.evaluation.tasks.respondents import NoModelContext, answered, task_inputs

pytest.importorskip("lm_eval")

SIGNS = {1122, 1129}
"""Prompts that ask for "#" or "!"."""
THEIRS = {
    "prompt_strict": "prompt_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "instruction_strict": "inst_level_strict_acc",
    "instruction_loose": "inst_level_loose_acc",
}


@pytest.fixture(scope="module")
def ifeval(shared_data: Path) -> IfevalTask:
    """Makes NLTK's sentence model findable too, for both."""
    return build_task(
        "ifeval", IfevalConfig(files=[str(shared_data / "ifeval" / "input_data.jsonl")]), task_inputs(shared_data)
    )


@pytest.fixture(scope="module")
def records(shared_data: Path) -> list[dict[str, Any]]:
    lines = (shared_data / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


Theirs = list[dict[str, Any]]


@pytest.mark.parametrize("turn", range(4))
def test_ifeval_equals_lm_eval_s_on_the_same_answers(
    ifeval: IfevalTask, records: list[dict[str, Any]], turn: int
) -> None:
    """Prompt i is answered in ways i + turn, i + turn + 4, ... of sixteen: each prompt in one way a turn."""
    from lm_eval.tasks.ifeval import utils

    answers = [KINDS[(index + 4 * turn) % len(KINDS)](record) for index, record in enumerate(records)]
    measured = ifeval.score({"one": answered(ifeval, answers)}, NoModelContext())["one"]
    with seeded_language_guess():
        theirs: Theirs = [utils.process_results(record, [text]) for record, text in zip(records, answers, strict=True)]
        ours = [check(item, text) for item, text in zip(ifeval.items, answers, strict=True)]
    remaining = [index for index, record in enumerate(records) if record["key"] not in SIGNS]
    assert len(remaining) == 539
    for index in remaining:
        strict, loose = ours[index]
        where = f"prompt {records[index]['key']}, {records[index]['instruction_id_list']}: {answers[index][:200]!r}"
        assert strict == theirs[index]["inst_level_strict_acc"], where
        assert loose == theirs[index]["inst_level_loose_acc"], where
        for level in ("strict", "loose"):
            assert measured.values[f"prompt_{level}"][index] == [float(theirs[index][f"prompt_level_{level}_acc"])], (
                where
            )
    for mine, name in THEIRS.items():
        actual = [theirs[index][name] for index in remaining]
        number = utils.agg_inst_level_acc(actual) if name.startswith("inst") else sum(actual) / len(actual)
        weights = measured.weights.get(mine, [1.0] * len(records))
        total = sum(measured.values[mine][index][0] * weights[index] for index in remaining)
        assert total / sum(weights[index] for index in remaining) == pytest.approx(number, abs=1e-12), mine
        assert 0.01 < number < 0.9, "an equality of nothing with nothing"


def test_the_answers_try_every_instruction_both_ways(ifeval: IfevalTask, records: list[dict[str, Any]]) -> None:
    observations = defaultdict(set)
    differ = 0
    with seeded_language_guess():
        for index, (item, record) in enumerate(zip(ifeval.items, records, strict=True)):
            for turn in range(4):
                strict, loose = check(item, KINDS[(index + 4 * turn) % len(KINDS)](record))
                differ += strict != loose
                for id, followed in zip(record["instruction_id_list"], strict, strict=True):
                    observations[id].add(followed)
    assert len(observations) == 25
    assert {id for id, outcomes in observations.items() if outcomes != {True, False}} == set()
    assert differ > 30, "strict and loose are two things"


def test_why_two_prompts_are_left_out(records: list[dict[str, Any]]) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    draws: dict[int, set[str]] = defaultdict(set)
    for record in records:
        for id, arguments in zip(record["instruction_id_list"], record["kwargs"], strict=True):
            if id == "keywords:letter_frequency":
                for _ in range(20):
                    checker = INSTRUCTION_DICT[id](id)
                    checker.build_description(**{name: value for name, value in arguments.items() if value})
                    draws[record["key"]].add(checker.get_instruction_args()["letter"])
    assert {key for key, letters in draws.items() if len(letters) > 1} == SIGNS


# ---------------------------------------------------------------------------------------------------------------- ARC

ARC_LIKE = """
task: arc_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def ours_and_theirs(
    model: Path, folder: Path, count: int, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[MultipleChoiceTask, ModelReader, list[dict[str, Any]], dict[str, float]]:
    """Both on the same questions: our task and reader, lm-eval's samples and results by its hf backend."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [str(shared_data / "arc" / "ARC-Easy.test.json")]
    label = TaskInputs(0, folder, [], False, "float32", lambda message: None, lambda message: None)
    task = build_task("arc", MultipleChoiceConfig(format="arc", files=files, max_items=count), label)
    rows = [
        {
            "question": question.context.removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {
                "text": list(question.choices),
                "label": [str(index) for index in range(len(question.choices))],
            },
            "answerKey": str(question.gold),
        }
        for question in task.questions
    ]
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "arc.yaml").write_text(ARC_LIKE.format(data=folder / "arc.jsonl"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    result = lm_eval.simple_evaluate(
        model="hf",
        # In float32, as by default, its log-softmax over 49,152 tokens is 1e-5 too high a token, and sums are 2e-4 off.
        model_args={"pretrained": str(model), "dtype": "float32", "softmax_dtype": "float64"},
        tasks=["arc_here"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )
    return task, ModelReader(model), result["samples"]["arc_here"], result["results"]["arc_here"]


def assert_equal(
    task: MultipleChoiceTask, reader: ModelReader, samples: list[dict[str, Any]], results: dict[str, float]
) -> None:
    logprobs, measured = task.read_choices(reader)["logprobs"], task.read(reader)
    assert len(samples) == len(task.items)
    for index, sample in enumerate(samples):
        assert sample["doc_id"] == index
        theirs = [filtered_resp[0] for filtered_resp in sample["filtered_resps"]]
        assert logprobs[index] == pytest.approx(theirs, abs=1e-4), sample["doc"]["question"]
        assert measured.values["acc"][index] == [sample["acc"]], sample["doc"]["question"]
        assert measured.values["acc_norm"][index] == [sample["acc_norm"]], sample["doc"]["question"]
    for metric in ("acc", "acc_norm"):
        number = sum(values[0] for values in measured.values[metric]) / len(samples)
        assert number == pytest.approx(results[f"{metric},none"], abs=1e-12)
        assert 0 < number < 1


def test_arc_equals_lm_eval_s(
    shared_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal(*ours_and_theirs(tiny_model, tmp_path, 40, shared_data, monkeypatch))


@pytest.mark.slow
def test_arc_of_a_real_model_equals_lm_eval_s(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.models.built_in import fetch

    try:
        model = fetch()
    except UserError as error:
        pytest.skip(str(error))
    assert_equal(*ours_and_theirs(model, tmp_path, 100, shared_data, monkeypatch))
