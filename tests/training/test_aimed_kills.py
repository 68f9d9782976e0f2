"""A stage that trains on rows is killed around its first, middle and last checkpoint and after its last step.

However long training was said to last, it ends after as many steps as the run that nobody killed, with the same
weights, metrics and curves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training.aimed_stages import KINDS, MID_EPOCH, make_stage
from tests.support.training.killed_runs import Check, make_check
from tests.support.training.kills import Kill, kills

CHECKPOINTS = (3, 6, 7)
WAYS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "max_steps-at-a-save": ({"epochs": 3, "max_steps": 6}, (3, 6)),
    "max_steps-at-an-epoch": ({"epochs": 3, "max_steps": 8}, (3, 6, 8)),
    "max_steps-beyond-the-epochs": ({"epochs": 1, "max_steps": 100}, (3, 4)),
    "epochs": ({"epochs": 2}, (3, 6, 8)),
    "part-of-an-epoch": ({"epochs": 1.75}, (3, 6, 7)),
    "one-step": ({"max_steps": 1}, (1,)),
    "packing": ({"packing": True, "batch_size": 2, "micro_batch_size": 1, "max_steps": 7, "epochs": 9}, (3, 6, 7)),
    "keep-best": ({"keep": "best", "eval_steps": 2, **MID_EPOCH}, CHECKPOINTS),
    "ema": ({"ema": 0.8, **MID_EPOCH}, CHECKPOINTS),
    "replay": ({"replay": "general", "replay_fraction": 0.25, **MID_EPOCH}, CHECKPOINTS),
    "anchor": ({"anchor": {"to": "kl", "weight": 0.1}, **MID_EPOCH}, CHECKPOINTS),
    "neftune": ({"neftune": 5, **MID_EPOCH}, CHECKPOINTS),
    "unfreeze": ({"tuning": {"method": "full", "unfreeze": {"at": {0: 1, 1: 2}, "unit": "epochs"}}, **MID_EPOCH},
                 CHECKPOINTS),
    "lisa": ({"tuning": {"method": "full", "lisa": {"layers": 1, "every": 2}}, **MID_EPOCH}, CHECKPOINTS),
}  # fmt: skip
"""How long ``sft`` trains, and what counts its steps; with the steps of its first, middle and last checkpoint."""

QUICK = ("max_steps-at-a-save", "part-of-an-epoch", "one-step", "keep-best")
"""Packing, replay and unfreezing have short tests of resuming in their own files."""


@pytest.fixture(scope="module")
def check(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Check:
    return make_check(make_stage, tiny_model, tmp_path_factory)


@pytest.mark.parametrize("kind", KINDS)
def test_kill_at_last_checkpoint_adds_no_step(kind: str, check: Check) -> None:
    check(kind, [Kill("after", CHECKPOINTS[-1]), Kill("saved")], **MID_EPOCH)


def test_kills_around_the_last_checkpoint_change_nothing(check: Check) -> None:
    check("sft", kills(CHECKPOINTS[-1:]), **MID_EPOCH)


@pytest.mark.parametrize("way", QUICK)
def test_killed_training_of_any_length_ends_like_a_whole_one(way: str, check: Check) -> None:
    fields, steps = WAYS[way]
    check("sft", [Kill("after", steps[-1])], **fields)


def test_a_stage_that_stops_early_stops_there_again(check: Check) -> None:
    """The step at which it stops is a multiple of ``save_steps``."""
    fields = {"early_stopping": {"patience": 1}, "keep": "best", "eval_steps": 3, "epochs": 20, "learning_rate": 0.3}
    expected = check("sft", [Kill("after", 3), Kill("trained"), Kill("saved")], **fields)
    assert expected["stopped_early"] and expected["steps"] < 80


def test_better_weights_of_a_killed_attempt_spare_the_checkpoint(check: Check) -> None:
    """The best weights are found after a checkpoint, twice, and the stage dies before the next one each time."""
    fields, _ = WAYS["keep-best"]
    check("sft", [Kill("after", 3), Kill("before", 6), Kill("before", 6)], **fields)


@pytest.mark.slow
@pytest.mark.parametrize("kill", kills(CHECKPOINTS), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_kill_changes_nothing(kind: str, kill: Kill, check: Check) -> None:
    check(kind, [kill], **MID_EPOCH)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kills_at_every_moment_change_nothing(way: str, check: Check) -> None:
    fields, steps = WAYS[way]
    check("sft", kills(steps), **fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_every_moment_change_nothing_for_adapters(kind: str, check: Check) -> None:
    check(kind, kills(CHECKPOINTS), **MID_EPOCH, tuning={"method": "lora", "rank": 4})
