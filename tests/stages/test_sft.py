"""Stage sft, end to end on a tiny model: it learns, and what it writes is an ordinary model folder."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from align.config.stages.sft import SftConfig
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.stages.sft import run
from align.store.artifacts import Kind
from tests.support.refusals import Refused
from tests.support.training.harness import context, data_artifact, events, losses, rows

TUNINGS = {"full": {"method": "full"}, "lora": {"method": "lora", "rank": 16, "alpha": 64}}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_it_learns_to_answer_and_to_stop(tuning: str, tiny_model: Path, tmp_path: Path) -> None:
    config = SftConfig(
        model="model",
        data="data",
        tuning=TUNINGS[tuning],
        learning_rate=1e-2,
        epochs=12,
        batch_size=8,
        max_length=128,
        eval_steps=20,
    )
    stage = context(tmp_path, config, tiny_model, data_artifact(tmp_path / "data", Kind.INSTRUCTIONS, train=80))
    metrics = run(stage)
    assert metrics["test_loss_after"] < metrics["test_loss_before"] / 5
    assert metrics["rows"] == 80
    assert metrics["tokens"] > 0
    assert metrics["tokens_per_second"] > 0
    assert len(losses(stage)) == metrics["steps"] == 120
    shown = events(stage, "progress")
    assert (shown[-1]["done"], shown[-1]["total"], shown[-1]["tokens"]) == (120, 120, metrics["tokens"])
    assert {e["step"] for e in events(stage, "metrics") if "test_loss" in e} == {0, 20, 40, 60, 80, 100, 120}
    assert not events(stage, "warning")
    folder = stage.output / "model"
    assert (stage.output / "adapter").is_dir() == (tuning == "lora")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(folder / "model.safetensors").values())
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    prompt = torch.tensor([render_prompt(tokenizer, rows(1)[0]["prompt"])])
    answer = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "red<|im_end|>"


def test_parameters_trained_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    config = SftConfig(
        model="model", data="data", tuning=TUNINGS["lora"], learning_rate=1e-3, max_steps=1, max_length=128
    )
    stage = context(tmp_path, config, tiny_model, data_artifact(tmp_path / "data", Kind.PREFERENCES))
    metrics = run(stage)
    assert metrics["steps"] == 1
    # rank 16, two layers: q, k, v, o (64 + 64 each), gate and up (64 + 128), down (128 + 64)
    assert metrics["trainable_parameters"] == 16 * 2 * (4 * 128 + 3 * 192)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_without_test_rows_nothing_is_measured_on_them(keep: str, tiny_model: Path, tmp_path: Path) -> None:
    config = SftConfig(
        model="model", data="data", learning_rate=1e-3, max_steps=2, eval_steps=1, max_length=128, keep=keep
    )
    data = data_artifact(tmp_path / "data", Kind.INSTRUCTIONS, train=20)
    pq.write_table(pq.read_table(data.split("test")).slice(0, 0), data.split("test"))
    stage = context(tmp_path, config, tiny_model, data)
    metrics = run(stage)
    assert metrics["steps"] > 0 and not any(name.startswith("test_") for name in metrics)
    assert (stage.output / "model" / "model.safetensors").is_file()
    assert not any("test_loss" in event for event in events(stage, "metrics"))
    assert (keep == "best") == any("validation_loss" in event for event in events(stage, "metrics"))
    notes = [event for event in events(stage, "note") if "the test split of" in str(event)]
    assert len(notes) == 1


def test_nan_loss_ends_sft_and_keeps_curve_and_checkpoints(
    refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model": "model", "data": "data", "batch_size": 8, "max_length": 128, "save_steps": 1, "max_steps": 6}
    data = data_artifact(tmp_path / "data", Kind.INSTRUCTIONS, train=48)
    stage = context(tmp_path, SftConfig(**fields, learning_rate=0.5, tuning={"method": "full"}), tiny_model, data)
    step = torch.optim.AdamW.step
    steps: list[int] = []

    def overflow(self: torch.optim.AdamW, *args: object, **options: object) -> object:
        result = step(self, *args, **options)
        steps.append(len(steps))
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data.fill_(math.inf)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    for _ in range(2):
        refused(run, stage)
        assert not (stage.output / "model").exists()
    # The second attempt resumes after the step that broke the weights, and says the same.
    curve = losses(stage)
    assert [(step, math.isfinite(loss)) for step, loss in curve.items()] == [
        (1, True),
        (2, True),
        (3, True),
        (4, False),
    ]
    assert len(steps) == 5
    assert {path.name for path in stage.checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    # A lower rate is another stage, which begins anew.
    lower = context(tmp_path / "lower", SftConfig(**fields, learning_rate=1e-3), tiny_model, data)
    assert math.isfinite(run(lower)["test_loss_after"])
