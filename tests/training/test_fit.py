"""Warnings of ``fit`` about how a run went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.base import Precision
from align.config.tuning import FullTuning
from align.models.loading import load_policy
from align.models.tuning.apply import notice
from align.stages.sft import run
from align.training.fit import SECONDS_FILE, TrainingClock, _timed_tokens, _warn_of_lost_progress
from align.training.held_out import divergence_alarm
from tests.support.training.harness import events
from tests.support.training.training_stages import make_stage

BROKEN_OFF = [
    *(0.69, 0.69, 0.69, 0.69, 0.69, 0.69, 0.69, 0.68, 0.69, 0.67, 0.65),
    *(0.63, 0.60, 0.64, 0.57, 0.63, 0.69, 0.50, 0.60, 0.48, 0.75, 0.52),
    *(0.72, 0.52, 0.73, 0.72, 0.72, 0.72, 0.72, 0.72, 0.71, 0.71, 0.70),
    *(0.71, 0.70, 0.71, 0.67, 0.70, 0.70, 0.70, 0.64, 0.70, 0.70, 0.70),
]
"""A reward model of the quickstart at a learning rate of 1e-3; 0.81 of the held-out pairs were still in order."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_note_counts_activations_as_they_are_trained(
    precision: Precision, tiny_model: Path, tmp_path: Path
) -> None:
    stage = make_stage("sft", tmp_path, tiny_model, {"method": "full"}, precision=precision, max_steps=1)
    run(stage)
    expected = notice(load_policy(tiny_model), FullTuning(), precision, low_residual=precision == "bfloat16")
    assert f"{expected}; micro-batches of 4" in [event["message"] for event in events(stage, "note")]


@pytest.mark.parametrize(("tuning", "is_kept"), [({"method": "full"}, True), ({"method": "lora"}, False)])
def test_full_tuning_keeps_the_memory_of_its_gradients(
    tuning: dict[str, Any], is_kept: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    @contextlib.contextmanager
    def untrimmed_heap() -> Iterator[None]:
        steps.append("kept")
        yield
        steps.append("given back")

    monkeypatch.setattr("align.training.fit.untrimmed_heap", untrimmed_heap)
    run(make_stage("sft", tmp_path, tiny_model, tuning, max_steps=1))
    assert steps == (["kept", "given back"] if is_kept else [])


def warnings_of(losses: list[float]) -> list[str]:
    warnings: list[str] = []
    config = SimpleNamespace(learning_rate=1e-3)
    _warn_of_lost_progress(SimpleNamespace(name="reward", config=config, warn=warnings.append), losses)  # type: ignore[arg-type]
    return warnings


def test_a_loss_that_fell_and_rose_again_is_told_of() -> None:
    (warning,) = warnings_of(BROKEN_OFF)
    # Parts of 8: 5.51 / 8, 4.78 / 8 and 5.51 / 8.
    assert warning.startswith("reward: the loss fell from 0.6887 to 0.5975 and rose to 0.6888 again (means of 8")
    assert warning.endswith("lower learning_rate (0.001).")


@pytest.mark.parametrize(
    "losses",
    [
        [0.69 - 0.005 * step for step in range(40)],  # learns
        [0.69, 0.5, 0.4, 0.4, 0.7],  # too few to tell
        [0.69, 0.70, 0.68, 0.71, 0.67] * 8,  # nothing but noise
        [0.7] * 8 + [0.4] * 16 + [0.5] * 16,  # a third of it is lost
    ],
    ids=["learns", "short", "noise", "a third"],
)
def test_other_curves_are_not(losses: list[float]) -> None:
    assert warnings_of(losses) == []


# ---- seconds of training ----


def test_clock_adds_the_seconds_before_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("align.training.fit.time.perf_counter", lambda: now[0])
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / SECONDS_FILE).write_text("12.500")
    clock = TrainingClock(checkpoint)
    now[0] = 103.25
    assert clock.seconds() == 15.75  # 12.5 + 103.25 - 100
    state = SimpleNamespace(is_world_process_zero=True, global_step=6)
    (tmp_path / "checkpoint-6").mkdir()
    clock.on_save(SimpleNamespace(output_dir=tmp_path), state, None)  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint-6" / SECONDS_FILE).read_text() == "15.750"
    assert TrainingClock(None).seconds() == 0.0


def test_tokens_without_seconds_are_not_counted(tmp_path: Path) -> None:
    """A checkpoint of an older version has tokens and no seconds."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"num_input_tokens_seen": 700}')
    clock = TrainingClock(checkpoint)
    assert not clock.is_complete and clock.seconds_before == 0.0
    trainer = SimpleNamespace(state=SimpleNamespace(num_input_tokens_seen=1000))
    assert _timed_tokens(trainer, clock, checkpoint) == 300
    assert _timed_tokens(trainer, TrainingClock(None), None) == 1000


# ---- divergence ----


def test_diverged_sft_is_an_alarm(tiny_model: Path, tmp_path: Path) -> None:
    """A learning rate of 1 ruins the model: the stage still ends, with an alarm in its record and its log."""
    stage = make_stage("sft", tmp_path, tiny_model, {"method": "full"}, max_steps=4, learning_rate=1.0)
    metrics = run(stage)
    assert metrics["test_loss_after"] > 2 * metrics["test_loss_before"]
    assert metrics["alarms"] == ["step 4: divergence"]
    assert [event["step"] for event in events(stage, "metrics") if "test_loss" in event] == [0, 4]
    messages = [event["message"] for event in events(stage, "warning")]
    assert any(f"{stage.name}: step 4: divergence: the held-out loss rose from" in message for message in messages)


@pytest.mark.parametrize(
    ("before", "after", "rings"),
    [
        ({"loss": 5.9}, {"loss": 25.0, "token_accuracy": 0.0}, True),
        ({"loss": 5.9}, {"loss": float("nan"), "token_accuracy": 0.0}, True),
        ({"loss": 2.0}, {"loss": 2.9, "token_accuracy": 0.5}, False),
        ({"loss": 0.69}, {"loss": 2.0, "accuracy": 0.7}, False),  # pairs
        ({}, {"loss": 25.0, "token_accuracy": 0.0}, False),  # not measured before
    ],
)
def test_divergence_is_a_much_higher_loss_of_answers(
    before: dict[str, float], after: dict[str, float], rings: bool
) -> None:
    warnings: list[str] = []
    context: Any = SimpleNamespace(name="sft", config=SimpleNamespace(learning_rate=0.1), warn=warnings.append)
    assert bool(divergence_alarm(context, 7, before, after)) == bool(warnings) == rings
