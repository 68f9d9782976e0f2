"""The lm_eval task: its settings, what it is built from, and real runs of lm-eval in their own process."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import Runtime
from align.config.stages.evaluation.tasks import LmEvalConfig
from align.config.validation import validate
from align.errors import UserError
from align.evaluation.answers import Measured
from align.evaluation.lm_eval import task as module
from align.evaluation.lm_eval.task import LmEvalTask
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task, task_identities
from tests.support.evaluation.tasks.lm_eval_folder import ALL, QUESTIONS, make_tasks
from tests.support.evaluation.tasks.readers import ModelReader
from tests.support.evaluation.tasks.respondents import task_inputs
from tests.support.refusals import Refused

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def reader(model: Path, info: SystemInfo | None = None) -> ModelReader:
    result = ModelReader(model, info)
    result.runtime = Runtime(device="cpu")
    return result


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"tasks": []},
        {"tasks": ["a", "a"]},
        {"tasks": ["a"], "revisions": {"allenai/ai2_arc": "main"}},
        {"tasks": ["a"], "backend": "hff"},
        {"tasks": ["a"], "shot": 1},
    ],
)
def test_settings_that_are_wrong(refused: Refused, block: dict[str, Any]) -> None:
    refused(validate, LmEvalConfig, {"task": "lm_eval", **block}, "pipelines/x.yaml: stages.evaluate.tasks.general")


def test_settings_and_identities_import_no_lm_eval_or_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom align.config.stages.evaluation.tasks import LmEvalConfig\n"
        "from align.evaluation.tasks import task_identities\n"
        f"found = task_identities(LmEvalConfig(tasks=['sums'], include={str(folder)!r}), Path('.'))\n"
        "print(sorted(found), {'lm_eval', 'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['data', 'include', 'lm_eval'] set()\n"


def test_identities_follow_the_tasks_files_and_their_data(tmp_path: Path) -> None:
    folder = make_tasks(tmp_path / "tasks")
    config = LmEvalConfig(tasks=["sums"], include="tasks")
    before = task_identities(config, tmp_path)
    assert task_identities(config, tmp_path) == before
    test = tmp_path / "tasks-data" / "test.jsonl"
    test.write_text(test.read_text().replace("barks", "meows"))
    other_data = task_identities(config, tmp_path)
    assert other_data["data"] != before["data"]
    assert other_data["include"] == before["include"]
    (folder / "scoring.py").write_text("# another scoring")
    assert task_identities(config, tmp_path)["include"] != before["include"]
    assert task_identities(config, tmp_path)["data"] == other_data["data"]


def test_folders_that_are_not_there_and_yaml_that_does_not_parse(refused: Refused, tmp_path: Path) -> None:
    config = LmEvalConfig(tasks=["a"], include="tasks")
    refused(task_identities, config, tmp_path)
    refused(lambda: build_task("general", config, task_inputs(tmp_path)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "a.yaml").write_text("task: [")
    refused(task_identities, config, tmp_path)


def test_without_lm_eval_or_vllm_nothing_is_started(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise UserError("align-pipeline[evaluation]")

    def start(*arguments: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(module, "run_lm_eval", start)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="evaluation"):
        patch.setattr(module, "lm_eval_version", missing)
        build_task("general", LmEvalConfig(tasks=["a"]), task_inputs(tmp_path))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    refused(lambda: build_task("general", LmEvalConfig(tasks=["a"], backend="vllm"), task_inputs(tmp_path)))


# ------------------------------------------------------------------------------------------ described and read for real


@dataclass
class Run:
    """A task and one system's numbers in it."""

    task: LmEvalTask
    warnings: list[str]
    before: list[str]
    """Metrics as they were known before anything was read."""
    reader: ModelReader
    measured: Measured


@pytest.fixture(scope="module")
def run(folder: Path, tiny_model: Path) -> Run:
    warnings: list[str] = []
    task_inputs_with_warnings = replace(task_inputs(folder.parent), warn=warnings.append)
    task = build_task("general", LmEvalConfig(tasks=ALL, include=folder.name), task_inputs_with_warnings)
    before, system = list(task.metrics), reader(tiny_model)
    return Run(task, warnings, before, system, task.read(system))


def test_items_are_the_questions_of_all_tasks(run: Run) -> None:
    task = run.task
    sizes = {"arc_like": 6, "sums": 6, "checks": 6, "text": 6, "quiz_a": 6, "quiz_b": 2}
    assert [item.id for item in task.items] == [
        f"{name}/{index}" for name, size in sizes.items() for index in range(size)
    ]
    assert [item.source for item in task.items] == [name for name, size in sizes.items() for _ in range(size)]
    assert task.items[0].prompt == [{"role": "user", "content": f"Question: {QUESTIONS[0][0]}\nAnswer:"}]
    assert task.items[18].prompt[0]["content"] == QUESTIONS[0][0], "a text without a question is shown itself"


def test_metrics_are_known_before_anything_is_read(run: Run) -> None:
    assert run.before == [
        "arc_like_acc", "arc_like_acc_norm", "sums_exact_match_strict", "sums_exact_match_flexible",
        "checks_all_passed", "checks_passed", "checks_longest",
        "text_word_perplexity", "text_byte_perplexity", "text_bits_per_byte", "quizzes_acc", "quizzes_acc_norm",
    ]  # fmt: skip
    assert run.task.primary == "arc_like_acc"
    metrics = run.task.metrics
    assert metrics["arc_like_acc"].better == "higher"
    assert metrics["text_bits_per_byte"].better == "lower"
    assert (metrics["text_word_perplexity"].unit, metrics["text_bits_per_byte"].unit) == (
        "nats per word", "bits per byte",
    )  # fmt: skip


def test_non_means_are_dropped_and_new_metrics_are_added(run: Run) -> None:
    assert set(run.task.metrics) == {*run.before, "checks_long_3"} - {"checks_longest"}
    assert list(run.measured.values) == list(run.task.metrics)
    assert run.measured.notes["left_out"] == {
        "arc_like mcc": "its aggregation, matthews_corrcoef, is no mean over documents",
        "checks longest,none": "no mean over documents",
    }
    aggregates = run.measured.notes["aggregates"]
    assert -1 <= aggregates["arc_like"]["mcc,none"] <= 1
    assert aggregates["checks"]["longest,none"] >= 2
    assert any("arc_like mcc" in warning for warning in run.warnings)
    assert any("checks_longest is left out" in warning for warning in run.warnings)


def test_metric_has_value_per_item_and_weighs_own_items(run: Run) -> None:
    sources = [item.source for item in run.task.items]
    for name, values in run.measured.values.items():
        assert [len(samples) for samples in values] == [1] * len(sources), name
        of = {sources[index] for index, weight in enumerate(run.measured.weights[name]) if weight}
        expected = (
            {"quiz_a", "quiz_b"} if name.startswith("quizzes") else {name.split("_")[0].replace("arc", "arc_like")}
        )
        assert of == expected, name
    assert run.measured.weights["checks_passed"][12:18] == [1.0, 2.0, 3.0, 1.0, 3.0, 2.0], "1 + gold outcomes"
    assert set(run.measured.weights["quizzes_acc_norm"][24:]) == {1.0}
    assert run.measured.weights["quizzes_acc"][24:] == pytest.approx([1 / 6] * 6 + [1 / 2] * 2)


def mean(run: Run, name: str) -> float:
    weights = run.measured.weights[name]
    pairs = zip(run.measured.values[name], weights, strict=True)
    return sum(samples[0] * weight for samples, weight in pairs) / sum(weights)


@pytest.mark.parametrize(
    ("name", "of", "key"),
    [
        ("arc_like_acc_norm", "arc_like", "acc_norm,none"),
        ("sums_exact_match_strict", "sums", "exact_match,strict-match"),
        ("checks_passed", "checks", "passed,none"),
        ("text_bits_per_byte", "text", "bits_per_byte,none"),
        ("quizzes_acc", "quizzes", "acc,none"),
        ("quizzes_acc_norm", "quizzes", "acc_norm,none"),
    ],
)
def test_numbers_are_lm_eval_s(run: Run, name: str, of: str, key: str) -> None:
    assert mean(run, name) == pytest.approx(run.measured.notes["aggregates"][of][key])


def test_perplexity_is_a_logarithm_of_lm_eval_s(run: Run) -> None:
    aggregates = run.measured.notes["aggregates"]["text"]
    assert math.exp(mean(run, "text_word_perplexity")) == pytest.approx(aggregates["word_perplexity,none"])
    assert mean(run, "text_byte_perplexity") / math.log(2) == pytest.approx(mean(run, "text_bits_per_byte"))


def test_numbers_are_those_of_the_checkpoint(run: Run) -> None:
    """Bits per byte by a plain loop over the tokens, which are bytes here."""
    lengths, losses = [], []
    for text, _, _ in QUESTIONS:
        ids = run.reader.tokenizer.encode(text, add_special_tokens=False)
        losses.append(-run.reader.by_plain_loop([run.reader.tokenizer.bos_token_id], ids))
        lengths.append(len(text.encode()))
    per_text = [loss / length / math.log(2) for loss, length in zip(losses, lengths, strict=True)]
    assert [samples[0] for samples in run.measured.values["text_bits_per_byte"][18:24]] == pytest.approx(per_text, 1e-4)
    assert run.measured.weights["text_bits_per_byte"][18:24] == lengths


def test_settings_say_what_was_asked(run: Run) -> None:
    settings = run.task.settings()
    assert settings["lm_eval"] == module.lm_eval_version()
    assert settings["tasks"]["sums"]["questions"] == 6
    assert len(settings["tasks"]["sums"]["docs"]) == 64
    assert (settings["backend"], settings["shots"], settings["chat"], settings["precision"]) == (
        "hf", None, False, "float32",
    )  # fmt: skip
    assert settings["seeds"]["fewshot_random_seed"] == 1234


# ------------------------------------------------------------------------------------------- what a read is asked with


@pytest.fixture
def jobs(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Jobs that a read would start a process for; each is answered with the real run's result."""
    cached = run.reader.cached("lm_eval-general", run.reader.results["lm_eval-general"][0], dict)
    started: list[dict[str, Any]] = []

    def start(job: dict[str, Any], base: Path, quiet: float) -> Any:
        started.append({**job, "quiet": quiet})
        return cached

    monkeypatch.setattr(module, "run_lm_eval", start)
    return started


def test_a_second_read_of_the_same_is_kept(run: Run, jobs: list[dict[str, Any]]) -> None:
    assert run.task.read(run.reader).values == run.measured.values
    assert not jobs
    other_reader = ModelReader(run.reader.model_dir)
    other_reader.runtime = Runtime(device="cpu")
    run.task.read(other_reader)
    assert len(jobs) == 1


def test_another_file_beside_the_tasks_is_another_read(
    run: Run, jobs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings hold a function's own source, and not that of what it calls."""
    other_reader = reader(run.reader.model_dir)
    other_reader.results = dict(run.reader.results)
    run.task.read(other_reader)
    assert not jobs
    monkeypatch.setattr(module, "identities", lambda config, base: {"include": "another digest"})
    run.task.read(other_reader)
    assert len(jobs) == 1


def test_a_prompted_system_s_message_and_examples_are_lm_eval_s(run: Run, jobs: list[dict[str, Any]]) -> None:
    info = SystemInfo("prompted", "sft", "prompted", "k2", system="Be brief.", shots=3)
    prompted = reader(run.reader.model_dir, info)
    prompted.runtime = Runtime(device="cpu", engine={"timeout": 7, "batch_size": 5})
    run.task.read(prompted)
    (job,) = jobs
    assert (job["system"], job["shots"], job["quiet"]) == ("Be brief.", 3, 7)
    assert job["engine"]["batch_size"] == 5
    assert job["model_dir"] == str(run.reader.model_dir)
    assert job["device"] == "cpu"
    # the stand-in says that nothing was shown, as lm-eval does of a task that fixes its number
    assert any(
        "fix their number of examples: prompted was shown 0 rather than 3" in warning for warning in run.warnings
    )
    names = prompted.results["lm_eval-general"][0]
    assert names != run.reader.results["lm_eval-general"][0], "another way of asking is another result"


def test_template_without_system_message_is_error_for_baseline(
    refused: Refused, run: Run, jobs: list[dict[str, Any]]
) -> None:
    prompted = reader(run.reader.model_dir, SystemInfo("prompted", "sft", "prompted", "k2", system="Be brief."))
    prompted.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages }}"
    )
    in_turns = LmEvalTask(
        "general", LmEvalConfig(tasks=ALL, chat=True), run.task.inputs, run.task.folder, run.task.described
    )
    refused(in_turns.read, prompted)
    assert not jobs
    run.task.read(prompted)  # plain text has no roles
    assert len(jobs) == 1


def test_other_questions_than_those_described_are_an_error(
    refused: Refused, run: Run, jobs: list[dict[str, Any]]
) -> None:
    docs = run.task.described["tasks"]["sums"]["docs"]
    changed = {**run.task.described["tasks"]["sums"], "docs": [{**docs[0], "hash": "0" * 64}, *docs[1:]]}
    described = {**run.task.described, "tasks": {**run.task.described["tasks"], "sums": changed}}
    task = LmEvalTask("general", run.task.config, run.task.inputs, run.task.folder, described)
    refused(lambda: task.read(reader(run.reader.model_dir)))


def test_only_what_is_no_mean_leaves_nothing_to_compare(refused: Refused, run: Run) -> None:
    only = {"arc_like": {**run.task.described["tasks"]["arc_like"]}}
    only["arc_like"]["metrics"] = [{"metric": "mcc", "better": True, "aggregation": "matthews_corrcoef"}]
    described = {**run.task.described, "tasks": only, "selected": run.task.described["selected"][:1]}
    refused(LmEvalTask, "general", run.task.config, run.task.inputs, run.task.folder, described)


@pytest.mark.slow
def test_a_failing_task_comes_with_lm_eval_s_own_words(tmp_path: Path, tiny_model: Path) -> None:
    folder = make_tasks(tmp_path / "tasks")
    scoring = folder / "scoring.py"
    task = build_task("general", LmEvalConfig(tasks=["checks"], include=str(folder), limit=1), task_inputs(tmp_path))
    scoring.write_text(scoring.read_text().replace("text = results[0]", "text = results[0] + 1"))
    with pytest.raises(RuntimeError, match=r"exit code 1\.\nThe end of its log:(.|\n)*TypeError"):
        task.read(reader(tiny_model))


@pytest.mark.slow
def test_vllm_inside_lm_eval_gives_the_numbers_of_transformers(run: Run, folder: Path) -> None:
    pytest.importorskip("vllm")
    task = build_task("general", LmEvalConfig(tasks=ALL, include=folder.name, backend="vllm"), run.task.inputs)
    system = reader(run.reader.model_dir)
    system.runtime = Runtime(device="cpu", engine={"cpu_kv_cache_gb": 0.1})
    measured = task.read(system)
    for name, values in measured.values.items():
        expected = [samples[0] for samples in run.measured.values[name]]
        # vLLM holds back bytes that are no character yet, with which a random model's answers end: other texts.
        if not name.startswith("checks"):
            assert [samples[0] for samples in values] == pytest.approx(expected, abs=1e-4), name
    assert measured.weights == run.measured.weights
