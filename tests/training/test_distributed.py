"""The same losses in two and three processes as in one, by DDP and in parts; runs that go on in another number of them.

Whole pipelines on a tiny model with gloo, every stage's processes started as ``align run`` starts them. 41 rows in
batches of 12: an epoch's last step has 5, which no number of processes shares out evenly. Runs are made once a module.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.pipeline import Pipeline
from align.runner import run_pipeline

ROWS: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 12, "max_length": 128, "precision": "float32", "max_steps": 6,
    "scheduler": "constant", "warmup_ratio": 0.0, "save_steps": 2,
}  # fmt: skip
SAMPLED: dict[str, Any] = {
    "policy": "model", "prompts": "prompts", "score": "tests.stages.vowels:share", "learning_rate": 1e-3,
    "rollout_batch": 12, "updates": 3, "max_tokens": 8, "max_prompt_tokens": 64, "precision": "float32",
}  # fmt: skip
LORA = {"method": "lora", "rank": 4}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"model": "model", "data": "rows", **ROWS},
    "reward": {"model": "model", "data": "rows", **ROWS},
    "dpo": {"policy": "model", "data": "rows", **ROWS, "beta": 0.5},
    "ppo": {**SAMPLED, "num_epochs": 2, "num_mini_batches": 2, "eval_updates": 2},
    "ppo_lora": {"stage": "ppo", **SAMPLED, "tuning": LORA},
    "sft_lora": {"stage": "sft", "model": "model", "data": "rows", **ROWS, "tuning": LORA, "ema": 0.9, "keep": "best",
                 "eval_steps": 2},
    "pretrain": {"model": "model", "data": "rows", **ROWS},
    "kto": {"policy": "model", "data": "rows", **ROWS, "micro_batch_size": 2},
    "orpo": {"policy": "model", "data": "rows", **ROWS, "micro_batch_size": 2},
    "cpo": {"policy": "model", "data": "rows", **ROWS, "micro_batch_size": 2},
    "simpo": {"policy": "model", "data": "rows", **ROWS, "micro_batch_size": 2},
    "distill": {"model": "model", "teacher": "teacher", "data": "rows", **ROWS, "on_policy": 0.5, "max_tokens": 8},
    "grpo": {**SAMPLED, "samples_per_prompt": 2, "zero_variance": "resample"},
    "rloo": {**SAMPLED, "samples_per_prompt": 2},
    "online_dpo": {**SAMPLED, "samples_per_prompt": 2},
    "rejection": {**SAMPLED, "samples_per_prompt": 2, "best": 1, "num_mini_batches": 1},
}  # fmt: skip
WITHIN = 1e-4


def pipeline(name: str, launch: dict[str, Any], **changes: Any) -> Pipeline:
    """``name`` trained from a tiny model under ``launch``."""
    stages = {
        "model": {"source": "tiny"},
        "teacher": {"stage": "model", "source": "tiny"},
        "rows": {"stage": "tests.training.given_rows:ROWS", "train": 41},
        "prompts": {"stage": "tests.stages.given:PROMPTS", "count": 10},
        name: {**STAGES[name], **changes},
    }
    runtime = {"device": "cpu", "engine": {"name": "transformers"}, "launch": {"timeout": 600, **launch}}
    return Pipeline({"name": "distributed", "seed": 3, "runtime": runtime, "stages": stages}, "p.yaml")


class Made:
    """What a run came to."""

    def __init__(self, name: str, folder: Path, metrics: dict[str, Any]) -> None:
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        self.points = [event for event in events if event["event"] == "metrics"]
        self.losses = [event["loss"] for event in self.points if "loss" in event]
        self.weights = load_file(folder / "model" / "model.safetensors")
        self.metrics = metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Runs a stage, once for the same question."""
    known: dict[tuple[str, int, str], Made] = {}

    def run(name: str, processes: int, strategy: str = "ddp") -> Made:
        if (name, processes, strategy) not in known:
            store = tmp_path_factory.mktemp(f"{name}-{processes}-{strategy}")
            launch = {"processes": processes, "strategy": strategy}
            finished = run_pipeline(pipeline(name, launch), store=store, only=None)
            known[name, processes, strategy] = Made(name, finished.artifacts[name].path, finished.metrics(name))
            shutil.rmtree(store)
        return known[name, processes, strategy]

    return run


def same(one: Made, other: Made) -> None:
    """Losses, held-out scores and weights within ``WITHIN``, and as many tokens."""
    assert len(one.losses) >= 3
    assert other.losses == pytest.approx(one.losses, abs=WITHIN)
    scores = {name: value for name, value in one.metrics.items() if name.startswith(("test_loss", "score_", "kl_"))}
    assert scores
    assert {name: other.metrics[name] for name in scores} == pytest.approx(scores, abs=WITHIN)
    assert other.metrics["tokens"] == one.metrics["tokens"]
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        assert (tensor - other.weights[name]).abs().max() < WITHIN, name


def test_two_processes_train_as_one(made: Callable[..., Made]) -> None:
    same(made("sft", 1), made("sft", 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_losses_are_those_of_one_process(
    made: Callable[..., Made], name: str, processes: int, strategy: str
) -> None:
    same(made(name, 1), made(name, processes, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_lora", "sft_lora", "grpo", "rloo", "online_dpo", "rejection", "simpo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_so_are_those_of_other_trainers_and_of_adapters(made: Callable[..., Made], name: str, strategy: str) -> None:
    same(made(name, 1), made(name, 2, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "orpo", "cpo", "kto", "distill"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_rest_train_too(made: Callable[..., Made], name: str, strategy: str) -> None:
    found = made(name, 2, strategy)
    assert len(found.losses) >= 3 and all(torch.isfinite(torch.tensor(found.losses)))
    assert found.metrics["loss_last"] < found.metrics["loss_first"]
