"""PPO with a damaged checkpoint: the older one is taken, and that is said; a script's own choice is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.pipeline.context import StageContext
from align.rl.checkpoint import last_checkpoint
from align.training.checkpoints import MARKER
from tests.support.rl.runs import FIELDS, outcome
from tests.support.rl.stages import make_stage
from tests.support.training.damage import DAMAGES, flip_bit
from tests.support.training.harness import warnings
from tests.support.training.killed_runs import KilledRun, make_killed_run
from tests.support.training.kills import assert_same, run

SETTINGS: dict[str, Any] = {"eval_updates": 1, "keep": "best"}
CASES = [
    *(("optimizer.pt", name) for name in DAMAGES),
    *(("trainer_state.json", name) for name in DAMAGES),
    *((name, "flipped-bit") for name in ("model.safetensors", "rng_state.pth", "ppo_state.json", "best.safetensors")),
    *((name, "empty") for name in ("model.safetensors", "rng_state.pth", "ppo_state.json", MARKER)),
]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledRun:
    def make(folder: Path) -> StageContext:
        return make_stage("ppo", folder, tiny_model, **SETTINGS)

    return make_killed_run(make, tmp_path_factory.mktemp("runs"), step=8)


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(*case, marks=() if index % 4 == 0 else pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_the_older_checkpoint_is_taken_and_that_is_said(
    name: str, damage: str, runs: KilledRun, tmp_path: Path
) -> None:
    stage = runs.copy_to(tmp_path / "run")
    DAMAGES[damage](stage.checkpoints / "checkpoint-8" / name)
    assert_same(runs.uninterrupted, stage, runs.expected, run(stage))
    (warning,) = [text for text in warnings(stage) if "damaged" in text]
    assert "ppo: checkpoint-8 is damaged" in warning and name in warning
    assert "Training resumes from checkpoint-4." in warning
    assert (stage.checkpoints / "damaged" / "checkpoint-8").is_dir()


def test_the_best_policy_is_that_of_the_checkpoint(runs: KilledRun, tmp_path: Path) -> None:
    stage = runs.copy_to(tmp_path / "run")
    shutil.rmtree(next(stage.checkpoints.glob("best-*")))
    assert_same(runs.uninterrupted, stage, runs.expected, run(stage))


def test_named_damaged_checkpoint_is_refused_and_true_skips_it(make_trainer, tmp_path):
    folder = tmp_path / "run"
    uninterrupted = make_trainer(output_dir=str(folder), **FIELDS)
    uninterrupted.train()
    flip_bit(folder / "checkpoint-16" / "optimizer.pt")
    messages = []
    first, second = (make_trainer(output_dir=str(folder), notify=messages.append, **FIELDS) for _ in range(2))
    with pytest.raises(UserError, match=r"checkpoint-16 is damaged: its file optimizer.pt .*Resume from an older"):
        first.train(resume_from_checkpoint=str(folder / "checkpoint-16"))
    second.train(resume_from_checkpoint=True)
    (message,) = messages
    assert "Training resumes from checkpoint-12" in message
    weights, logs = outcome(second)
    expected, expected_logs = outcome(uninterrupted)
    assert logs == expected_logs
    assert all(tensor.equal(expected[name]) for name, tensor in weights.items())
    assert last_checkpoint(folder) == folder / "checkpoint-16"
