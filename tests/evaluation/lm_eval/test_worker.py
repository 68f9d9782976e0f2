"""What is relied on of lm-eval, in this process: its results' form, its index, prompts, data of the Hub."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.tasks import LmEvalConfig
from align.errors import UserError
from align.evaluation.lm_eval import worker
from align.evaluation.lm_eval.worker import evaluate, read_results
from tests.support.evaluation.tasks.lm_eval_folder import QUESTIONS, make_tasks
from tests.support.refusals import Refused

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(autouse=True)
def _undisturbed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data caches go to a temporary folder, and what the adapter patches in its own process is put back."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)


def job(folder: Path | None, *tasks: str, **more: Any) -> dict[str, Any]:
    config = LmEvalConfig(tasks=list(tasks)).model_dump(mode="json", exclude={"task"})
    return {**config, "include": None if folder is None else str(folder), "system": "", "template": {}, **more}


Captured = tuple[dict[str, Any], Any]


@pytest.fixture(scope="module")
def captured(folder: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Return the result of ``evaluate`` for a prompted system, and lm-eval's own result."""
    import datasets

    caught: list[Any] = []
    original = lm_eval.simple_evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", datasets.load_dataset)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(lm_eval, "simple_evaluate", lambda **inputs: caught.append(original(**inputs)) or caught[-1])
        how = {"chat": True, "system": "Be brief.", "shots": 2, "limit": 3, "device": "cpu", "precision": "float32"}
        results = evaluate(job(folder, "arc_like", "sums", "checks", model_dir=str(tiny_model), **how))
    return results, caught[0]


def test_prompted_system_sends_message_and_examples(captured: Captured) -> None:
    actual, full = captured
    context, choice = full["samples"]["arc_like"][0]["arguments"][0]
    assert context.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion: ")
    assert context.count(" Really?\nAnswer:<|im_end|>\n<|im_start|>assistant\n") == 2, "turns of the train split"
    assert context.endswith("Which animal barks?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert choice == "dog"
    assert actual["shots"] == {"arc_like": 2, "sums": 2, "checks": 0}, "checks says 0, which lm-eval holds to"
    assert list(actual["hashes"]["arc_like"]) == ["0", "1", "2"], "limit"


def test_values_are_lm_eval_s_samples_and_give_its_results(captured: Captured) -> None:
    actual, full = captured
    values = actual["values"]
    assert set(values["arc_like"]) == {"acc,none", "acc_norm,none", "mcc,none"}
    assert set(values["sums"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert values["sums"]["exact_match,strict-match"] == [[0, 1.0], [1, 0.0], [2, 0.0]]
    assert values["sums"]["exact_match,flexible-extract"] == [[0, 0.0], [1, 0.0], [2, 0.0]]
    assert [len(outcomes) for _, outcomes in values["checks"]["passed,none"]] == [1, 2, 3]
    assert actual["aggregates"]["sums"]["exact_match,strict-match"] == pytest.approx(1 / 3)
    assert actual["better"]["checks"]["longest"] is False
    for sample in full["samples"]["arc_like"]:
        assert values["arc_like"]["acc,none"][sample["doc_id"]] == [sample["doc_id"], sample["acc"]]
    json.dumps(actual, allow_nan=False)


@pytest.mark.parametrize("name", ["samples", "results", "higher_is_better", "n-shot"])
def test_a_result_without_a_part_is_loud(refused: Refused, captured: Captured, name: str) -> None:
    broken = {key: value for key, value in captured[1].items() if key != name}
    refused(read_results, broken)


@pytest.mark.parametrize("name", ["doc_id", "doc_hash", "filter", "metrics", "acc"])
def test_samples_without_a_field_are_loud(refused: Refused, captured: Captured, name: str) -> None:
    broken = copy.deepcopy({key: captured[1][key] for key in ("samples", "results", "higher_is_better", "n-shot")})
    del broken["samples"]["arc_like"][1][name]
    refused(read_results, broken)


def test_result_keys_that_are_no_metric_and_filter_are_loud(refused: Refused, captured: Captured) -> None:
    full = captured[1]
    renamed = {
        task: {key.replace(",", "/"): value for key, value in row.items()} for task, row in full["results"].items()
    }
    refused(read_results, {**full, "results": renamed})


def test_numbers_that_json_does_not_know_are_none() -> None:
    import numpy as np

    assert worker._numbers(np.float32(0.5)) == 0.5
    assert worker._numbers(np.bool_(True)) == 1.0
    assert worker._numbers((np.int64(1), False)) == [1.0, 0.0]
    assert worker._numbers(float("nan")) is None
    assert worker._numbers(float("-inf")) is None
    assert worker._numbers(("a text", "its reference")) == "other"


# ------------------------------------------------------------------------------------------------------- the index


@pytest.fixture
def some_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval's index over a few of its own folders: all of them take seconds."""
    import lm_eval.tasks as module

    parent = Path(module.__file__).parent
    folders = [parent / name for name in ("arc", "humaneval", "ifeval", "mmlu/default", "mmmu")]
    real = module.TaskManager

    def manager(include_path: Any = None, include_defaults: bool = True, **more: Any) -> Any:
        paths = [*(folders if include_defaults else []), *([include_path] if include_path else [])]
        return real(include_path=paths, include_defaults=False, **more)

    monkeypatch.setattr(module, "TaskManager", manager)
    yield


@pytest.mark.usefixtures("some_of_its_own")
@pytest.mark.parametrize(
    "name",
    [
        "arc_esy",
        "humaneval",
        "mmmu_val",
        "arc_easy",
    ],
)
def test_what_is_refused(refused: Refused, name: str) -> None:
    refused(lambda: worker.describe(job(None, name)))


def test_an_own_folder_needs_no_index_of_lm_eval_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks as module

    real = module.TaskManager

    def manager(include_path: Any = None, include_defaults: bool = True) -> Any:
        assert not include_defaults
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(module, "TaskManager", manager)
    assert "quizzes" in worker.task_index(str(folder), ["quizzes", "sums"]).all_groups
    with pytest.raises(AssertionError):
        worker.task_index(str(folder), ["sums", "arc_easy"])


def test_a_group_with_a_task_of_lm_eval_s_own_is_looked_up_there(some_of_its_own: None, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("group: both\ntask: [arc_easy]\n")
    index = worker.task_index(str(tmp_path), ["both"])
    assert {name for name, _ in worker._entries(index, "both")} == {"both", "arc_easy"}
    assert "arc_easy" in index.all_tasks, "or lm-eval would take the name for a task without settings"


def test_a_task_named_alone_and_in_its_group_is_refused(refused: Refused, folder: Path) -> None:
    refused(lambda: worker.describe(job(folder, "quiz_b", "quizzes")))


def test_description_depends_on_settings_not_on_folder(folder: Path, tmp_path: Path) -> None:
    def digests(where: Path) -> dict[str, str]:
        described = worker.describe(job(where, "checks", "arc_like"))["tasks"]
        return {name: entry["config"] for name, entry in described.items()}

    before = digests(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert digests(moved) == before
    scoring = moved / "scoring.py"
    scoring.write_text(scoring.read_text().replace("% 2 == 0", "% 2 == 1"))
    after = digests(moved)
    assert after["checks"] != before["checks"]
    assert after["arc_like"] == before["arc_like"]


# ---------------------------------------------------------------------------------------------------- data of the Hub


class Hub:
    """``datasets.load_dataset``, answering for ARC and IFEval, and remembering how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, path: str, *arguments: Any, **options: Any) -> Any:
        import datasets

        self.asked.append((path, options.get("revision")))
        if path == "google/IFEval":
            row = {"key": 1, "prompt": "Write.", "instruction_id_list": ["length_constraints:number_sentences"]}
            rows = [{**row, "kwargs": [{"num_sentences": 2, "relation": "at least"}]}]
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
        rows = [
            {"question": text, "choices": {"text": choices, "label": ["A", "B", "C"]}, "answerKey": "ABC"[gold]}
            for text, choices, gold in QUESTIONS
        ]
        part = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict({"train": part, "validation": part, "test": part})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, some_of_its_own: None) -> Hub:
    import datasets

    result = Hub()
    monkeypatch.setattr(datasets, "load_dataset", result)
    return result


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_data_of_the_hub_are_read_at_a_commit(hub: Hub) -> None:
    described = worker.describe(job(None, "arc_easy", revisions={"allenai/ai2_arc": COMMIT}, limit=2))
    assert hub.asked == [("allenai/ai2_arc", COMMIT)]
    arc_task = described["tasks"]["arc_easy"]
    assert [doc["text"] for doc in arc_task["docs"]] == [f"Question: {text}\nAnswer:" for text, _, _ in QUESTIONS[:2]]
    assert arc_task["data"] == "allenai/ai2_arc"


def test_hub_data_without_commit_is_refused_with_remedy(refused: Refused, hub: Hub) -> None:
    refused(lambda: worker.describe(job(None, "arc_easy")))


def test_where_the_hub_answers_its_commit_is_in_the_message(
    refused: Refused, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Info:
        sha = COMMIT

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, path, timeout: Info())
    refused(lambda: worker.describe(job(None, "arc_easy")))


def test_ifeval_needs_no_download_and_is_refused_where_it_would(
    refused: Refused, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    def download(*arguments: Any, **options: Any) -> None:
        raise AssertionError("lm-eval would fetch data from the network")

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.data, "path", [])  # earlier tests may have found the model, or loaded the module
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.")]:
        monkeypatch.delitem(sys.modules, name)
    request = job(None, "ifeval", revisions={"google/IFEval": COMMIT})
    described = worker.describe(request)
    assert [metric["metric"] for metric in described["tasks"]["ifeval"]["metrics"]][:2] == [
        "prompt_level_strict_acc", "inst_level_strict_acc",
    ]  # fmt: skip

    def missing() -> None:
        raise UserError("no sentence model")

    monkeypatch.setattr(worker, "ensure_punkt", missing)
    refused(worker.describe, request)


@pytest.mark.slow
def test_lm_eval_s_whole_index_is_searched() -> None:
    with pytest.raises(UserError, match="Did you mean 'hellaswag'"):
        worker.describe(job(None, "helaswag"))
