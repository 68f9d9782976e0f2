"""A killed run goes on as if nothing had happened, and from a whole checkpoint only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from align.config.tuning import FullTuning, LoraTuning
from align.errors import UserError
from align.rl.checkpoint import DRAFT, last_checkpoint
from tests.support.rl.runs import FIELDS, KillAt, Killed, outcome


@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(rank=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("killed_at", [8, 10])  # at the boundary after two updates; in the middle of the third
def test_a_killed_run_resumes_bit_for_bit(make_trainer, tmp_path, tuning, killed_at):
    uninterrupted = make_trainer(tuning=tuning, reward=True, output_dir=str(tmp_path / "whole"), **FIELDS)
    uninterrupted.train()
    expected_weights, expected_logs = outcome(uninterrupted)

    folder = tmp_path / "killed"
    first = make_trainer(tuning=tuning, reward=True, output_dir=str(folder), callbacks=[KillAt(killed_at)], **FIELDS)
    with pytest.raises(Killed):
        first.train()
    torch.manual_seed(12345)  # a fresh process has other random states
    second = make_trainer(tuning=tuning, reward=True, output_dir=str(folder), **FIELDS)
    checkpoint = last_checkpoint(folder)
    assert checkpoint == folder / "checkpoint-8"
    second.train(resume_from_checkpoint=str(checkpoint))
    weights, logs = outcome(second)
    assert logs == expected_logs
    assert len(logs) == 4
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert second.kl_controller.value == uninterrupted.kl_controller.value != 0.05


def test_run_with_thinking_budget_resumes_bit_for_bit(make_trainer, tmp_path):
    # The prompts open a thought, which a random model never closes with a tag.
    rows = [{"id": str(number), "prompt": f"say {'abc' * number}<think>\n"} for number in range(8)]
    fields = FIELDS | {"rows": rows, "updates": 3, "max_tokens": 20, "thinking_budget": 4}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    expected_weights, expected_logs = outcome(whole)
    for entry in expected_logs:
        # "\n</think>\n\n" with a byte a token, unless the end of turn came before the budget's four tokens
        assert entry["forced_tokens"] == 11 * (1 - entry["open_thoughts"]) > 5
        assert entry["length"] == entry["thought_length"] + entry["answer_length"] - entry["forced_tokens"]
        # With stale weights, or if forced tokens counted, the engine's log-probabilities would differ.
        assert entry["parity_gap_max"] < 1e-4
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make_trainer(output_dir=str(folder), callbacks=[KillAt(6)], **fields).train()
    torch.manual_seed(12345)
    second = make_trainer(output_dir=str(folder), **fields)
    second.train(resume_from_checkpoint=str(last_checkpoint(folder)))
    weights, logs = outcome(second)
    assert logs == expected_logs
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def test_a_finished_run_resumes_to_its_end(make_trainer, tmp_path):
    make_trainer(output_dir=str(tmp_path / "run"), **FIELDS).train()
    again = make_trainer(output_dir=str(tmp_path / "run"), **FIELDS)
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "run")))
    assert again.state.global_step == 16


def test_only_whole_checkpoints_count(make_trainer, tmp_path):
    folder = tmp_path / "run"
    assert last_checkpoint(folder) is None
    make_trainer(output_dir=str(folder), save_total_limit=2, **FIELDS).train()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoint-12", "checkpoint-16", "rollouts", "rollouts.json")
    ]
    shutil.copytree(folder / "checkpoint-16", folder / DRAFT / "checkpoint-20")  # a kill while saving
    (folder / "checkpoint-16" / "trainer_state.json").unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-12"
    assert not (folder / DRAFT).exists()


def test_a_kill_at_any_write_leaves_the_last_checkpoint_whole(make_trainer, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer = make_trainer(output_dir=str(folder), **FIELDS)
    writes = []
    original = torch.save

    def save(*arguments, **options):
        writes.append(arguments[1])
        if len(writes) == 5:  # somewhere inside the second checkpoint
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Killed):
        trainer.train()
    assert DRAFT in str(writes[-1])
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert [path.name for path in Path(folder).glob("*checkpoint*")] == ["checkpoint-4"]
    assert not (Path(folder) / DRAFT).exists()


def test_another_run_s_checkpoint_is_refused(make_trainer, tmp_path):
    folder = tmp_path / "run"
    make_trainer(output_dir=str(folder), **FIELDS).train()
    checkpoint = str(last_checkpoint(folder))
    trainer = make_trainer(output_dir=str(folder), **(FIELDS | {"max_tokens": 5}))
    with pytest.raises(UserError, match="max_tokens 6, this run has 5"):
        trainer.train(resume_from_checkpoint=checkpoint)
    lora = make_trainer(tuning=LoraTuning(rank=4), output_dir=str(folder), **FIELDS)
    with pytest.raises(UserError, match="another model, tuning or critic"):
        lora.train(resume_from_checkpoint=checkpoint)


def test_checkpoints_of_another_program_are_left_alone(tmp_path):
    """A script may point ``output_dir`` at a folder in which another trainer, or an older align, has written."""
    foreign = tmp_path / "checkpoint-40"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"weights")
    assert last_checkpoint(tmp_path) is None
    assert (foreign / "model.safetensors").read_bytes() == b"weights"


def test_a_resumed_run_may_begin_to_normalize_its_scores(make_trainer, tmp_path):
    folder = tmp_path / "run"
    make_trainer(output_dir=str(folder), **(FIELDS | {"updates": 1, "normalize_scores": False})).train()
    trainer = make_trainer(output_dir=str(folder), **(FIELDS | {"updates": 2, "normalize_scores": True}))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.update == 2 and trainer.objective.scale.count == trainer.config.rollout_batch
