"""PPO with other ways of fitting than full and LoRA: its reference is the start, and it resumes bit for bit."""

from __future__ import annotations

import pytest
import torch

from align.models.tuning.apply import initial_policy
from align.rl.checkpoint import last_checkpoint
from tests.support.models.tuning.tuning_cases import CASES, push, tuning_of
from tests.support.rl.runs import FIELDS, KillAt, Killed, outcome

OTHERS = ("pissa_dora", "ia3", "vera", "oft", "embeddings", "dora", "ln_tuning")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize("name", ["loftq", *SLOW])
def test_a_killed_run_resumes_bit_for_bit(make_trainer, tmp_path, name):
    tuning = tuning_of(CASES[name])
    uninterrupted = make_trainer(tuning=tuning, reward=True, output_dir=str(tmp_path / "whole"), **FIELDS)
    uninterrupted.train()
    expected_weights, expected_logs = outcome(uninterrupted)
    drift = [abs(entry["kl"]) for entry in expected_logs]  # an estimate, which may be below 0
    assert drift[0] < 1e-4 < max(drift)  # it starts at its reference
    folder = tmp_path / "killed"
    first = make_trainer(tuning=tuning, reward=True, output_dir=str(folder), callbacks=[KillAt(8)], **FIELDS)
    with pytest.raises(Killed):
        first.train()
    torch.manual_seed(12345)
    second = make_trainer(tuning=tuning, reward=True, output_dir=str(folder), **FIELDS)
    second.train(resume_from_checkpoint=str(last_checkpoint(folder)))
    weights, logs = outcome(second)
    assert logs == expected_logs
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.parametrize("name", ["lora", "pissa", "loftq"])
def test_the_drift_is_seen_in_bfloat16_too(make_trainer, name):
    """Policy and reference are measured within one autocast, which keeps copies of trained matrices."""
    trainer = make_trainer(tuning=tuning_of(CASES[name]), bf16=True, updates=2, learning_rate=1e-2)
    trainer.train()
    first, second = (entry["kl_k3"] for entry in trainer.state.log_history if "kl_k3" in entry)
    assert first == 0.0
    assert second > 0.05


@pytest.mark.parametrize("critic", ["reward", "policy"])
@pytest.mark.parametrize("name", ["pissa_dora", "loftq", "ia3"])
def test_policy_critic_and_reward_model_are_independent(make_trainer, tiny_reward, name, critic):
    """They share frozen tensors: what one method does to them, the others must not see."""
    from align.models.loading import load_reward

    trainer = make_trainer(tuning=tuning_of(CASES[name]), reward=True, critic=critic)
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    with torch.no_grad():
        before = trainer.model.policy(input_ids=ids).logits
        values = trainer.model.critic.values(trainer.model.critic.trunk(input_ids=ids).last_hidden_state)
        if critic == "reward" and name != "loftq":
            score = load_reward(tiny_reward)(input_ids=ids).logits[0, 0]
            assert values[0, -1] == pytest.approx(float(score), abs=1e-4)
        push(trainer.model.critic)
        assert trainer.model.policy(input_ids=ids).logits.equal(before)
        push(trainer.model.policy)
        assert not trainer.model.policy(input_ids=ids).logits.equal(before)
        with initial_policy(trainer.model.policy) as start:
            assert torch.allclose(start(input_ids=ids).logits, before, atol=1e-5)
