"""Early stopping and the best weights, and that a resumed run stops and keeps where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.validation import validate
from align.data.rows import assistant, read_rows, write_rows
from align.data.steps.split import group
from align.errors import UserError
from align.pipeline.context import StageContext
from align.stages.sft import run
from align.store.artifacts import Kind
from align.training.arguments import SCHEDULERS, schedule_options
from align.training.rows import read_splits
from tests.support.training.harness import context, data_artifact, events, losses, rows
from tests.support.training.killed_stage import Killed, dying

HOT = {"learning_rate": 0.05, "scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": 100.0}
"""What makes the held-out loss rise again after a few steps."""


def made(root: Path, model: Path, **fields: Any) -> StageContext:
    usual = {"batch_size": 4, "max_length": 128, "precision": "float32", "epochs": 6, "eval_steps": 2, "save_steps": 3}
    config = SftConfig(model="model", data="data", **{**usual, **HOT, **fields})
    return context(root, config, model, data_artifact(root / "data", Kind.INSTRUCTIONS, train=24, test=8))


def scored(stage: StageContext, split: str = "validation") -> dict[int, float]:
    name = f"{split}_loss"
    return {e["step"]: e[name] for e in events(stage, "metrics") if name in e and e["step"] > 0}


def weights(stage: StageContext) -> dict[str, torch.Tensor]:
    return load_file(stage.output / "model" / "model.safetensors")


def test_the_best_weights_are_the_result(tiny_model: Path, tmp_path: Path) -> None:
    stage = made(tmp_path / "best", tiny_model, keep="best", early_stopping={"patience": 2})
    metrics = run(stage)
    observations = scored(stage)
    best = min(observations, key=lambda step: observations[step])
    assert metrics["best_step"] == best == metrics["steps"] - 4
    assert metrics["best_validation_loss"] == observations[best]
    short = made(tmp_path / "short", tiny_model, max_steps=best, keep="best")
    assert metrics["test_loss_after"] == pytest.approx(run(short)["test_loss_after"], rel=1e-6)
    assert all(tensor.equal(weights(short)[name]) for name, tensor in weights(stage).items())


def test_test_split_does_not_affect_stopping_and_kept_weights(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"keep": "best", "early_stopping": {"patience": 2}}
    plain, changed = (made(tmp_path / name, tiny_model, **settings) for name in ("plain", "changed"))
    misleading = [{**row, "completion": [assistant("zq" * 9)]} for row in rows(8, start=200)]
    write_rows(changed.artifact("data").split("test"), misleading)
    metrics, again = run(plain), run(changed)
    assert (again["best_step"], again["steps"]) == (metrics["best_step"], metrics["steps"])
    assert all(tensor.equal(weights(changed)[name]) for name, tensor in weights(plain).items())
    assert again["test_loss_after"] != metrics["test_loss_after"]
    assert list(scored(plain, "test")) == [metrics["steps"]]  # once, after the choice


def test_validation_rows_are_of_questions_that_are_not_learned(tiny_model: Path, tmp_path: Path) -> None:
    stage = made(tmp_path, tiny_model, keep="best")
    splits = read_splits(stage)
    questions = {name: {group(row) for row in split} for name, split in splits.items()}
    assert not questions["validation"] & (questions["train"] | questions["test"])
    assert len(splits["validation"]) + len(splits["train"]) == 24 and splits["validation"]
    assert splits["test"] == read_rows(stage.artifact("data").split("test"))
    (note,) = (event["message"] for event in events(stage, "note"))
    assert f"{len(splits['validation'])} of 24 train rows choose the checkpoint" in note
    assert "validation" not in read_splits(made(tmp_path, tiny_model))
    few = made(tmp_path, tiny_model, keep="best", max_rows=3, eval_rows=2)
    assert {name: len(split) for name, split in read_splits(few).items()} == {"train": 3, "validation": 2, "test": 2}
    write_rows(stage.artifact("data").split("train"), rows(1))
    with pytest.raises(UserError, match="the train split has one question only.*set `keep: last`"):
        read_splits(stage)


def test_training_stops_when_the_held_out_loss_no_longer_falls(tiny_model: Path, tmp_path: Path) -> None:
    stage = made(tmp_path, tiny_model, early_stopping={"patience": 2})
    metrics = run(stage)
    observations = scored(stage)
    best = min(observations, key=lambda step: observations[step])
    assert metrics["stopped_early"] and metrics["best_step"] == best
    assert metrics["steps"] == best + 4 < 36
    assert max(losses(stage)) == best + 4
    assert any("stopped at step" in event["message"] for event in events(stage, "note"))


@pytest.mark.parametrize("dies_at", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_a_resumed_run_stops_and_keeps_where_the_whole_one_does(dies_at: int, tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"early_stopping": {"patience": 3}, "keep": "best"}
    uninterrupted, parts = (made(tmp_path / name, tiny_model, **settings) for name in ("whole", "parts"))
    expected = run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, dies_at))
    result = run(parts)
    assert result["resumed_from_step"] == dies_at - dies_at % 3
    for name in ("best_step", "stopped_early", "steps", "test_loss_after"):
        assert result[name] == expected[name], name
    assert all(tensor.equal(weights(parts)[name]) for name, tensor in weights(uninterrupted).items())


def test_a_run_killed_after_it_stopped_takes_no_more_steps(tiny_model: Path, tmp_path: Path) -> None:
    stage = made(tmp_path, tiny_model, early_stopping={"patience": 1}, keep="best", save_steps=1)
    first = run(stage)
    again = run(stage)  # as after a kill between the last step and the record
    assert first["stopped_early"] and again["stopped_early"]
    assert again["resumed_from_step"] == first["steps"] - 1
    assert (again["steps"], again["best_step"]) == (first["steps"], first["best_step"])
    assert again["test_loss_after"] == first["test_loss_after"]


def test_an_average_is_what_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    stage = made(tmp_path / "long", tiny_model, keep="best", ema=0.5)
    metrics = run(stage)
    assert metrics["best_validation_loss"] == min(scored(stage).values())
    averaged = made(tmp_path / "short", tiny_model, keep="best", ema=0.5, max_steps=metrics["best_step"])
    assert metrics["test_loss_after"] == pytest.approx(run(averaged)["test_loss_after"], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        (SftConfig, {"keep": "best"}, "keep: best needs the validation loss during training; set eval_steps"),
        (RewardConfig, {"early_stopping": {}}, "early_stopping needs the validation loss"),
        (SftConfig, {"keep": "bst", "eval_steps": 1}, "Did you mean 'best'"),
        (SftConfig, {"early_stopping": {"patiense": 1}}, "Did you mean 'patience'"),
        (SftConfig, {"early_stoping": {}}, "Did you mean 'early_stopping'"),
        (SftConfig, {"min_lr_ratio": 0.1}, "min_lr_ratio has no effect with scheduler cosine"),
        (SftConfig, {"decay_ratio": 0.1}, "decay_ratio has no effect with scheduler cosine; take wsd"),
        (SftConfig, {"scheduler": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "more than all steps"),
        (SftConfig, {"gradient_checkpoint": True}, "Did you mean 'gradient_checkpointing'"),
        (SftConfig, {"trainer": {"gradient_checkpointing": True}}, "set 'gradient_checkpointing' next to 'trainer'"),
        (SftConfig, {"trainer": {"neftune_noise_alpha": 5}}, "set 'neftune' next to 'trainer'"),
        (SftConfig, {"trainer": {"assistant_only_loss": True}}, "set 'supervise: all' next to"),
        (SftConfig, {"trainer": {"packing": True}}, "set 'packing' next to"),
        (SftConfig, {"paking": True}, "Did you mean 'packing'"),
        (SftConfig, {"padding_fre": True}, "Did you mean 'padding_free'"),
        (SftConfig, {"supervice": "all"}, "Did you mean 'supervise'"),
        (SftConfig, {"neftun": 5}, "Did you mean 'neftune'"),
        (SftConfig, {"decay_ration": 0.1}, "Did you mean 'decay_ratio'"),
    ],
)
def test_mistakes_are_named(kind: type, extra: dict[str, Any], message: str) -> None:
    fields = {"model": "model", "data": "data", "learning_rate": 1e-4}
    with pytest.raises(UserError, match=message):
        validate(kind, {**fields, **extra}, "p.yaml: stages.x")


def rates(scheduler: str, steps: int = 20, **fields: Any) -> list[float]:
    """The learning rate of each step, as a share of the peak."""
    from transformers import get_scheduler

    config = SftConfig(model="m", data="d", learning_rate=1, scheduler=scheduler, **fields)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        SCHEDULERS[scheduler], optimizer, num_warmup_steps=2, num_training_steps=steps,
        scheduler_specific_kwargs=schedule_options(config, steps),
    )  # fmt: skip
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*values, schedule.get_last_lr()[0]]


def test_schedules_have_their_shapes() -> None:
    assert rates("constant")[2:] == [1.0] * 19
    assert rates("linear")[11] == pytest.approx(0.5) and rates("linear")[-1] == 0
    assert rates("cosine")[11] == pytest.approx(0.5) and rates("cosine")[-1] == pytest.approx(0)
    assert rates("cosine_with_min_lr")[-1] == pytest.approx(0.1)
    assert rates("cosine_with_min_lr", min_lr_ratio=0.4)[11] == pytest.approx(0.7)
    wsd = rates("wsd", decay_ratio=0.25)
    assert wsd[2:16] == [1.0] * 14 and wsd[15:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert rates("wsd", decay_ratio=0.25, min_lr_ratio=0.5)[-1] == pytest.approx(0.5)
    assert rates("inverse_sqrt")[8] == pytest.approx(0.5) and rates("inverse_sqrt")[-1] > 0.3


def test_activations_made_anew_change_no_number(tiny_model: Path, tmp_path: Path) -> None:
    plain, recomputed = (
        made(tmp_path / str(on), tiny_model, gradient_checkpointing=on, max_steps=6, learning_rate=1e-3, packing=True)
        for on in (False, True)
    )
    run(plain)
    run(recomputed)
    assert losses(plain) == pytest.approx(losses(recomputed), rel=1e-6)


def test_liger_is_for_gpus(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_liger_kernel needs a GPU, and this stage runs on the CPU"):
        run(made(tmp_path, tiny_model, trainer={"use_liger_kernel": True}))
