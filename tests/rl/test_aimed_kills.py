"""A stage that learns from its own samples is killed around its checkpoints and after its last update.

``ppo``, ``grpo``, ``rloo``, ``online_dpo`` and ``rejection`` end with the weights, metrics and curves of the run that
nobody killed, however many updates they were to make and whatever ends them early.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.errors import StageFailed
from align.rl import alarms, checkpoint
from align.rl.alarms import Alarm
from align.rl.checkpoint import save_checkpoint
from align.stages import rl
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


def test_run_stopped_by_an_alarm_fails_and_keeps_policy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm comes with the update whose checkpoint would be written next. It comes again in the next attempt."""

    def at_the_fourth(history: Any) -> list[Alarm]:
        return [Alarm("collapse", 4, "the policy says the same to everything")] if len(history) >= 4 else []

    monkeypatch.setattr(alarms, "alarms", at_the_fourth)
    for _ in range(2):
        stage = make_stage("ppo", tmp_path, tiny_model, on_alarm="stop", updates=8, save_updates=1)
        with pytest.raises(StageFailed, match="at update 4: collapse: .* The policy of update 3, from before it, is"):
            rl.run(stage)
        assert not (stage.output / "model").exists()
        kept = load_file(stage.checkpoints / "before-alarm" / "model.safetensors")
    monkeypatch.setattr(alarms, "alarms", lambda history: [])
    whole = make_stage("ppo", tmp_path / "whole", tiny_model, updates=8, save_updates=1)
    checkpointed: dict[str, Any] = {}

    def note(trainer: Any) -> None:
        save_checkpoint(trainer)
        if trainer.update == 3:
            trainer.save_model(str(tmp_path / "third"))
            checkpointed.update(load_file(tmp_path / "third" / "model.safetensors"))

    monkeypatch.setattr(checkpoint, "save_checkpoint", note)
    rl.run(whole)
    assert kept.keys() == checkpointed.keys()
    assert all(kept[name].equal(tensor) for name, tensor in checkpointed.items())


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
