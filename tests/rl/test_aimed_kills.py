"""A stage that learns from its own samples is killed around its checkpoints and after its last update.

``ppo``, ``grpo``, ``rloo``, ``online_dpo`` and ``rejection`` end with the weights, metrics and curves of the run that
nobody killed, however many updates they were to make and whatever ends them early.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.rl import alarms
from align.rl.alarms import Alarm
from tests.support.rl.stages import KINDS, make_stage
from tests.support.training.killed_runs import Check, make_check
from tests.support.training.kills import Kill, kills

CHECKPOINTS = (4, 8, 10)
"""Two optimizer steps an update."""
WAYS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "one-update": ({"updates": 1}, (2,)),
    "every-update": ({"updates": 3, "save_updates": 1}, (2, 4, 6)),
    "mini-batches": ({"num_epochs": 1, "num_mini_batches": 2, "micro_batch_size": 2}, CHECKPOINTS),
    "full": ({"tuning": {"method": "full"}}, CHECKPOINTS),
    "keep-best": ({"eval_updates": 1, "keep": "best"}, CHECKPOINTS),
    "validated-at-the-end": ({"eval_updates": 2}, CHECKPOINTS),
    "ahead": ({"max_staleness": 2}, CHECKPOINTS),
    "ptx": ({"ptx": "rows", "ptx_coef": 0.5, "ptx_rows": 2}, CHECKPOINTS),
    "critic-warmup": ({"critic_warmup_updates": 2}, CHECKPOINTS),
}


@pytest.fixture(scope="module")
def check(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Check:
    return make_check(make_stage, tiny_model, tmp_path_factory, same_rollouts=True)


@pytest.mark.parametrize("kind", KINDS)
def test_kill_at_last_checkpoint_adds_no_update(kind: str, check: Check) -> None:
    assert check(kind, [Kill("after", CHECKPOINTS[-1]), Kill("saved")])["updates"] == 5


def test_killed_stage_of_any_length_ends_like_a_whole_one(check: Check) -> None:
    """The best policy and sampling ahead have short tests of resuming: ``test_validation.py``, ``test_prefetch.py``."""
    fields, steps = WAYS["one-update"]
    check("ppo", [Kill("unmarked", steps[-1]), Kill("after", steps[-1])], **fields)


def test_run_stopped_by_an_alarm_stays_stopped(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm comes with the update whose checkpoint is written next."""

    def at_the_fourth(history: Any) -> list[Alarm]:
        return [Alarm("collapse", 4, "the policy says the same to everything")] if len(history) >= 4 else []

    monkeypatch.setattr(alarms, "alarms", at_the_fourth)
    metrics = check("ppo", [Kill("after", 8), Kill("trained"), Kill("saved")], on_alarm="stop", updates=8)
    assert metrics["updates"] == 4
    assert metrics["alarms"] == ["update 4: collapse"]
    assert metrics["stopped"].startswith("update 4: collapse")


def test_a_run_over_its_kl_budget_ends_there_again(check: Check) -> None:
    fields = {"kl_budget": 0.05, "updates": 12, "learning_rate": 1e-2}
    metrics = check("ppo", [Kill("after", 4), Kill("trained"), Kill("saved")], **fields)
    assert "over kl_budget" in metrics["stopped"]
    assert 2 <= metrics["updates"] < 12


@pytest.mark.slow
@pytest.mark.parametrize("kill", kills(CHECKPOINTS), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_kill_changes_nothing(kind: str, kill: Kill, check: Check) -> None:
    check(kind, [kill])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kills_at_every_moment_change_nothing(way: str, check: Check) -> None:
    fields, steps = WAYS[way]
    check("ppo", kills(steps), **fields)
