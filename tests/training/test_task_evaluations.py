"""Tasks during training: they change no result, choose weights, cost what they may, and never read test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.stages.preference import DpoConfig
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.validation import validate
from align.data.rows import user
from align.errors import UserError
from align.models.loading import load_tokenizer
from align.models.reward import RewardModel
from align.pipeline.context import StageContext
from align.runner.runner import run_pipeline
from align.stages import dpo, reward, sft
from align.store.artifacts import Kind
from align.training.task_evaluations import TaskEvaluations
from tests.support.training.distributed_runs import pipeline
from tests.support.training.harness import WORDS, context, data_artifact, events, losses, rows, warnings
from tests.support.training.killed_stage import Killed, dying

USUAL = {"learning_rate": 1e-2, "batch_size": 4, "max_length": 128, "precision": "float32", "max_steps": 6}


def write_tasks(folder: Path) -> dict[str, Any]:
    """Return a task that samples and a task that reads, with their files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [{"question": f"Add {n} and 1.", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(3)]
    # Training teaches to repeat the word, so the accuracy rises from chance to 1.
    choices = [
        {"question": f"Say {word}?", "choices": [word, WORDS[number - 1]], "answer": 0}
        for number, word in enumerate(WORDS)
    ]
    for name, records in (("sums", questions), ("words", choices)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {
        "sums": {"task": "gsm8k", "files": [str(folder / "sums.jsonl")], "max_tokens": 8, "temperature": 0.7},
        "words": {
            "task": "multiple_choice",
            "files": [str(folder / "words.jsonl")],
            "chat": True,
            "format": "generic",
        },
    }


def sft_stage(root: Path, model: Path, evaluate: dict[str, Any] | None, **fields: Any) -> StageContext:
    if evaluate is not None:
        evaluate = {"every": 2, "tasks": write_tasks(root.parent / "tasks"), "at_most": 1.0, **evaluate}
    config = validate(SftConfig, {"model": "model", "data": "data", **USUAL, **fields, "evaluate": evaluate}, "here")
    return context(root, config, model, data_artifact(root / "data", Kind.INSTRUCTIONS, train=24, test=8))


def scored(stage: StageContext, name: str) -> dict[int, float]:
    return {event["step"]: event[name] for event in events(stage, "metrics") if name in event}


def weights(stage: StageContext) -> dict[str, torch.Tensor]:
    return load_file(stage.output / "model" / "model.safetensors")


@pytest.mark.parametrize("tuning", [{"method": "full"}, {"method": "lora", "rank": 8, "dropout": 0.1}])
def test_tasks_do_not_change_training(tuning: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    stages = [
        sft_stage(tmp_path / name, tiny_model, evaluate, tuning=tuning, neftune=5.0)
        for name, evaluate in (("with", {}), ("without", None))
    ]
    with_tasks, _ = (sft.run(stage) for stage in stages)
    assert losses(stages[0]) == losses(stages[1])
    assert all(tensor.equal(weights(stages[1])[name]) for name, tensor in weights(stages[0]).items())
    assert set(scored(stages[0], "sums.final")) == set(scored(stages[0], "words.acc")) == {0, 2, 4, 6}
    assert with_tasks["words.acc_last"] == scored(stages[0], "words.acc")[6]
    assert with_tasks["evaluations"] == 4 and with_tasks["evaluations_skipped"] == 0
    assert 0 < with_tasks["evaluation_share"] < 1


def test_best_metric_chooses_weights(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "learning_rate": 0.05, "scheduler": "constant", "warmup_ratio": 0.0, "keep": "best"}
    evaluation = {"best_metric": "words.acc", "at_most": None}
    stage = sft_stage(tmp_path / "best", tiny_model, evaluation, **settings)
    metrics = sft.run(stage)
    accuracies = {step: value for step, value in scored(stage, "words.acc").items() if step}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert (metrics["best_step"], metrics["best_words.acc"]) == (best, accuracies[best])
    # No row is held back: the weights are those of a run that ends at the best step.
    short = sft_stage(tmp_path / "short", tiny_model, None, **(settings | {"keep": "last", "max_steps": best}))
    sft.run(short)
    assert all(tensor.equal(weights(short)[name]) for name, tensor in weights(stage).items())


def test_resumed_stage_repeats_no_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"save_steps": 2, "keep": "best", "early_stopping": {"patience": 2}}
    plain, killed = (
        sft_stage(tmp_path / name, tiny_model, {"best_metric": "words.acc"}, **settings) for name in ("plain", "killed")
    )
    expected = sft.run(plain)
    with pytest.raises(Killed):
        sft.run(dying(killed, 5))
    before = len(scored_events(killed, "words.acc"))
    resumed = sft.run(killed)
    names = ("best_step", "best_words.acc", "evaluations", "words.acc_first", "words.acc_last", "steps")
    assert {name: resumed[name] for name in names} == {name: expected[name] for name in names}
    assert scored(killed, "words.acc") == scored(plain, "words.acc")
    # Steps 0, 2 and 4 were evaluated by the first attempt, and 4 is in its checkpoint.
    assert (before, len(scored_events(killed, "words.acc"))) == (3, resumed["evaluations"])
    assert all(tensor.equal(weights(plain)[name]) for name, tensor in weights(killed).items())


def test_expensive_evaluations_are_skipped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    stage = sft_stage(tmp_path / "stage", tiny_model, {"at_most": 1e-4})
    metrics = sft.run(stage)
    # The first evaluation always runs, because its cost is unknown; its time alone exceeds the limit from then on.
    assert set(scored(stage, "sums.final")) == {0}
    assert (metrics["evaluations"], metrics["evaluations_skipped"]) == (1, 3)
    assert any("3 were skipped" in event["message"] for event in events(stage, "note"))


def test_time_limit_counts_evaluations_of_all_attempts(tiny_model: Path, tmp_path: Path) -> None:
    stage = sft_stage(tmp_path / "stage", tiny_model, {"at_most": 0.1})
    evaluations = TaskEvaluations(stage, load_tokenizer(tiny_model))
    # 9 s of 100 s; another 3 s would be 12 of 103.
    evaluations.load_state_dict({"scores": [[0, {}]], "skipped": [], "seconds": 9.0, "last": 3.0, "total": 100.0})
    assert evaluations.run(2, lambda: {"words.acc": 1.0}) is None and evaluations.skipped == [2]
    # 11 + 3 of 140 + 3 is 9.8 %.
    evaluations.load_state_dict({"scores": [[0, {}]], "skipped": [2], "seconds": 11.0, "last": 3.0, "total": 140.0})
    assert evaluations.run(4, lambda: {"words.acc": 1.0}) == {"words.acc": 1.0}
    assert evaluations.run(4, lambda: {"words.acc": 0.0}) is None  # evaluated already
    assert evaluations.state_dict()["scores"] == [[0, {}], [4, {"words.acc": 1.0}]]


def test_dpo_reads_pairs_that_are_held_back(tiny_model: Path, tmp_path: Path) -> None:
    evaluation = {"every": 3, "tasks": {"preference": {}}, "at_most": 1.0, "best_metric": "preference.acc"}
    config = validate(
        DpoConfig, {"policy": "model", "data": "data", **USUAL, "keep": "best", "evaluate": evaluation}, "here"
    )
    data = data_artifact(tmp_path / "data", Kind.PREFERENCES, train=40, test=8)
    stage = context(tmp_path, config, tiny_model, data, "policy")
    metrics = dpo.run(stage)
    assert metrics["pairs"] == 32 and metrics["validation_pairs"] == 8
    assert set(scored(stage, "preference.acc")) == {0, 3, 6}
    assert metrics["preference.acc_last"] == 1.0
    assert metrics["best_preference.acc"] == max(
        value for step, value in scored(stage, "preference.acc").items() if step
    )
    assert not warnings(stage)


def test_reward_model_scores_pairs_as_when_finished(tiny_model: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    fields = ("prompt", "chosen", "rejected")
    texts = [{name: row[name][-1]["content"] for name in fields} for row in rows(10, start=100)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    evaluation = {"every": 3, "tasks": {"reward_pairs": {"files": [str(pairs)]}}, "at_most": 1.0}
    config = validate(RewardConfig, {"model": "model", "data": "data", **USUAL, "evaluate": evaluation}, "here")
    stage = context(tmp_path, config, tiny_model, data_artifact(tmp_path / "data", Kind.PREFERENCES))
    metrics = reward.run(stage)
    assert set(scored(stage, "reward_pairs.accuracy")) == {0, 3, 6}
    model = RewardModel(stage.output / "model", torch.device("cpu"), "float32")
    prompts = [[user(row["prompt"])] for row in texts]
    chosen, rejected = (model.score(prompts, [row[side] for row in texts]) for side in ("chosen", "rejected"))
    gaps = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    assert metrics["reward_pairs.accuracy_last"] == sum(gap > 0 for gap in gaps) / 10
    assert metrics["reward_pairs.margin_last"] == pytest.approx(sum(gaps) / 10, abs=1e-5)


def test_items_in_test_split_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    stage = sft_stage(tmp_path / "stage", tiny_model, {})
    question = rows(1, start=24)[0]["prompt"][0]["content"]
    record = {"question": question.upper(), "choices": ["red", "blue"], "answer": 0}
    with (tmp_path / "tasks" / "words.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"stage: evaluate.tasks.words: 1 of 9 items are rows of the test split"):
        sft.run(stage)
    assert not stage.events.exists()  # nothing was loaded


def test_items_that_are_trained_on_raise_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    stage = sft_stage(tmp_path / "stage", tiny_model, {}, max_steps=1)
    question = rows(1, start=8)[0]["prompt"][0]["content"]
    record = {"question": question, "choices": ["red", "blue"], "answer": 0}
    (tmp_path / "tasks" / "words.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    sft.run(stage)
    assert [
        text for text in warnings(stage) if "evaluate.tasks.words: 1 of 1 items are rows that are trained on" in text
    ]


def test_unknown_best_metric_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    stage = sft_stage(tmp_path / "stage", tiny_model, {"best_metric": "words.ac"}, keep="best")
    with pytest.raises(UserError, match=r"best_metric 'words.ac' does not exist.*Did you mean 'words.acc'"):
        sft.run(stage)


def scored_events(stage: StageContext, name: str) -> list[dict[str, Any]]:
    return [event for event in events(stage, "metrics") if name in event]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_evaluate_as_one_does(tmp_path: Path) -> None:
    evaluation = {"every": 2, "at_most": 1.0, "tasks": write_tasks(tmp_path / "tasks"), "best_metric": "words.acc"}
    evaluation["tasks"]["sums"]["temperature"] = 0.0
    records = []
    for processes in (1, 2):
        run = pipeline("sft", {"processes": processes}, keep="best", evaluate=evaluation)
        records.append(run_pipeline(run, store=tmp_path / f"store{processes}").metrics("sft"))
    names = ("evaluations", "best_step", "best_words.acc", "words.acc_first", "words.acc_last", "sums.final_last")
    assert [records[0][name] for name in names] == [records[1][name] for name in names]
