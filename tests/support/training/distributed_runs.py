"""What tests of stages in several processes share: pipelines on a tiny model, and what became of them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align import Pipeline
from align.errors import StageFailed
from align.pipeline.registry import find_stage
from align.runner.runner import run_pipeline

ROWS: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 12, "max_length": 128, "precision": "float32", "max_steps": 6,
    "scheduler": "constant", "warmup_ratio": 0.0, "save_steps": 2,
}  # fmt: skip
SAMPLED: dict[str, Any] = {
    "policy": "model", "prompts": "prompts", "score": "tests.support.stages.vowels:share", "learning_rate": 1e-3,
    "rollout_batch": 12, "updates": 3, "max_tokens": 8, "max_prompt_tokens": 64, "precision": "float32",
}  # fmt: skip
LORA = {"method": "lora", "rank": 4}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"model": "model", "data": "rows", **ROWS},
    "reward": {"model": "model", "data": "rows", **ROWS},
    # AdamW divides a gradient near 0 by itself, which makes steps of rounding: a larger epsilon leaves it small.
    "dpo": {"policy": "model", "data": "rows", **ROWS, "beta": 0.5, "trainer": {"adam_epsilon": 1e-6}},
    "dpo_anchored": {"stage": "dpo", "policy": "model", "data": "rows", **ROWS, "beta": 0.5,
                     "anchor": {"to": "kl", "weight": 2.0}, "trainer": {"adam_epsilon": 1e-6}},
    "ppo": {**SAMPLED, "num_epochs": 2, "num_mini_batches": 2, "eval_updates": 2},
    "ppo_lora": {"stage": "ppo", **SAMPLED, "tuning": LORA},
    "sft_lora": {"stage": "sft", "model": "model", "data": "rows", **ROWS, "tuning": LORA, "ema": 0.9, "keep": "best",
                 "eval_steps": 2},
    "pretrain": {"model": "model", "data": "texts", **ROWS, "batch_size": 2, "max_length": 64},
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
        "rows": {"stage": "tests.support.training.row_stages:ROWS", "train": 41},
        "texts": {"stage": "tests.support.training.row_stages:TEXTS", "train": 200},
        "prompts": {"stage": "tests.support.stages.fixed_inputs:PROMPTS", "count": 10},
        **({"teacher": {"stage": "sft", **STAGES["sft"]}} if name == "distill" else {}),  # or it would teach itself
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


def same(first: Made, second: Made) -> None:
    """Losses, held-out scores and weights within ``WITHIN``, and as many tokens."""
    assert len(first.losses) >= 3
    assert second.losses == pytest.approx(first.losses, abs=WITHIN)
    scores = {name: value for name, value in first.metrics.items() if name.startswith(("test_loss", "score_", "kl_"))}
    assert scores
    assert {name: second.metrics[name] for name in scores} == pytest.approx(scores, abs=WITHIN)
    assert second.metrics["tokens"] == first.metrics["tokens"]
    assert first.weights.keys() == second.weights.keys()
    for name, tensor in first.weights.items():
        assert (tensor - second.weights[name]).abs().max() < WITHIN, name


def interrupted(tmp_path: Path, name: str, first: dict[str, Any], then: dict[str, Any]) -> Made:
    """The stage, ended by the death of its last rank once there is a checkpoint, and gone on with under ``then``."""
    store = tmp_path / "store"
    last = first.get("processes", 1) - 1

    def kill() -> None:
        end = time.monotonic() + 1500
        where = f"{find_stage(STAGES[name].get('stage', name)).kind}/*.partial"
        while time.monotonic() < end and not list(store.glob(f"{where}/checkpoints/checkpoint-*/{DONE[name]}")):
            time.sleep(0.02)
        if last == 0:
            return
        (pid,) = store.glob(f"{where}/ranks/{last}.pid")
        os.kill(int(pid.read_text()), signal.SIGKILL)

    more = {"max_steps": 40} if "max_steps" in STAGES[name] else {"updates": 12}
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageFailed, match=f"rank {last} of {last + 1} was killed by SIGKILL"):
        run_pipeline(pipeline(name, first, **more), store=store)
    killer.join()
    resumed = run_pipeline(pipeline(name, then, **more), store=store)
    actual = Made(name, resumed.artifacts[name].path, resumed.metrics(name))
    folder = resumed.artifacts[name].path
    assert "resuming from" in (folder / "log.txt").read_text() + (folder / "events.jsonl").read_text()
    return actual


DONE = {"sft": "complete.json", "sft_lora": "complete.json", "ppo": "ppo_state.json"}
