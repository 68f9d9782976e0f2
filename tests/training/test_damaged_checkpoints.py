"""A stage whose newest checkpoint is damaged says so, and goes on from the older one to the whole run's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.pipeline.context import StageContext
from align.training.checkpoints import MARKER, mark_complete, read_state, write_state
from tests.support.training.aimed_stages import MID_EPOCH, make_stage
from tests.support.training.damage import DAMAGES, flip_bit
from tests.support.training.harness import warnings
from tests.support.training.killed_runs import KilledRun, make_killed_run
from tests.support.training.kills import assert_same, run

FIELDS: dict[str, Any] = {"keep": "best", "eval_steps": 2, **MID_EPOCH}
CASES = [
    *(("optimizer.pt", name) for name in DAMAGES),
    *(("trainer_state.json", name) for name in DAMAGES),
    *((name, "flipped-bit") for name in ("model.safetensors", "rng_state.pth", "scheduler.pt", "best.safetensors")),
    *((name, "empty") for name in ("model.safetensors", "rng_state.pth", "stopping.json", MARKER)),
    (MARKER, "truncated"),
]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledRun:
    def make(folder: Path) -> StageContext:
        return make_stage("sft", folder, tiny_model, **FIELDS)

    return make_killed_run(make, tmp_path_factory.mktemp("runs"), step=6)


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(*case, marks=() if index % 3 == 0 else pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_the_older_checkpoint_is_taken_and_that_is_said(
    name: str, damage: str, runs: KilledRun, tmp_path: Path
) -> None:
    stage = runs.copy_to(tmp_path / "run")
    DAMAGES[damage](stage.checkpoints / "checkpoint-6" / name)
    metrics = run(stage)
    assert metrics["resumed_from_step"] == 3
    assert_same(runs.uninterrupted, stage, runs.expected, metrics)
    (warning,) = warnings(stage)
    assert "sft: checkpoint-6 is damaged" in warning and name in warning
    assert "Training resumes from checkpoint-3." in warning
    assert (stage.checkpoints / "damaged" / "checkpoint-6").is_dir()


def test_without_a_whole_checkpoint_it_starts_again(runs: KilledRun, tmp_path: Path) -> None:
    stage = runs.copy_to(tmp_path / "run")
    for step in (3, 6):
        flip_bit(stage.checkpoints / f"checkpoint-{step}" / "optimizer.pt")
    metrics = run(stage)
    assert metrics["resumed_from_step"] == 0
    assert_same(runs.uninterrupted, stage, runs.expected, metrics)
    assert all("Training resumes from its start." in warning for warning in warnings(stage))
    assert len(warnings(stage)) == 2


def test_the_best_weights_are_those_of_the_checkpoint(runs: KilledRun, tmp_path: Path) -> None:
    """The file beside the checkpoints is one that a killed attempt wrote later, or it is damaged."""
    stage = runs.copy_to(tmp_path / "run")
    (stage.checkpoints / "best.safetensors").write_bytes(b"damaged")
    assert_same(runs.uninterrupted, stage, runs.expected, run(stage))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scores_before_training_are_computed_again(
    damage: str, runs: KilledRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = runs.copy_to(tmp_path / "run")
    DAMAGES[damage](stage.checkpoints / "before.json")
    assert_same(runs.uninterrupted, stage, runs.expected, run(stage))
    assert ("its content is computed again" in caplog.text) == (damage != "deleted")


def test_a_checkpoint_without_logged_losses_can_be_finished(runs: KilledRun, tmp_path: Path) -> None:
    stage = runs.copy_to(tmp_path / "run")
    run(stage)
    last = stage.checkpoints / "checkpoint-7"
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    (last / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}), encoding="utf-8")
    mark_complete(last)
    metrics = run(stage)
    assert metrics["resumed_from_step"] == metrics["steps"] == 7
    assert "loss_first" not in metrics and "loss_last" not in metrics


def test_nothing_is_unpickled(runs: KilledRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[str, bool] = {}
    load: Callable[..., Any] = torch.load

    def recorded(file: Any, *args: Any, **options: Any) -> Any:
        loaded[Path(file).name] = options.get("weights_only", False)
        return load(file, *args, **options)

    monkeypatch.setattr(torch, "load", recorded)
    run(runs.copy_to(tmp_path / "run"))
    assert loaded == dict.fromkeys(("optimizer.pt", "scheduler.pt", "rng_state.pth"), True)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "1", "[" * 100_000, '{"content": {}}', "\x00"])
def test_a_state_file_with_other_content_counts_as_none(content: str, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    file.write_text(content, encoding="utf-8")
    assert read_state(file) is None


def test_a_state_file_gives_back_what_was_written(tmp_path: Path) -> None:
    scores = {"loss": 0.1 + 0.2, "accuracy": 1 / 3, "margin": -0.0}
    write_state(tmp_path / "before.json", scores)
    assert read_state(tmp_path / "before.json") == scores
    assert [path.name for path in tmp_path.iterdir()] == ["before.json"]
    assert read_state(tmp_path / "other.json") is None
