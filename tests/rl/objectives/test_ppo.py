"""The objective of PPO: rewards of turns, advantages and the rest of the policy, worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.stages.policy_gradient import PpoConfig
from align.rl.objectives.ppo import PPOObjective
from align.rl.rollout import Rollout

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lam": 1.0,
    "whiten_advantages": False,
    "critic_warmup_updates": 2,
}


def make_rollout(scores: list[float], **tensors: torch.Tensor) -> Rollout:
    """Return responses of three tokens each, whose policy is 0.5 nats a token from the reference."""
    count = len(scores)
    shape = (count, 3)
    tensors = {
        "scores": torch.tensor(scores),
        "finished": torch.ones(count, dtype=torch.bool),
        "response_mask": torch.ones(shape, dtype=torch.bool),
        "logprobs": torch.full(shape, -1.0),
        "ref_logprobs": torch.full(shape, -1.5),
        "values": torch.tensor([[0.5, 1.0, 2.0, 9.0]]).expand(count, 4),
        **tensors,
    }
    lists = [[1]] * count
    return Rollout(0, [{}] * count, list(range(count)), lists, lists, [""] * count, tensors)


def test_rewards_of_turns_are_a_part_of_the_score() -> None:
    rollout = make_rollout([5.0], turn_rewards=torch.tensor([[1.0, 0.0, 2.0]]))
    PPOObjective(PpoConfig.for_trainer(**SETTINGS)).advantages(rollout, SimpleNamespace(in_reward=0.2))  # type: ignore[arg-type]
    # Each token pays 0.2 * 0.5; the last one earns 5 - 3 of the score and its turn's 2.
    assert rollout.tensors["rewards"].flatten().tolist() == pytest.approx([0.9, -0.1, 3.9])
    # gamma = lambda = 1: the return is the sum of the rewards to come, the advantage that minus the value.
    assert rollout.tensors["returns"].flatten().tolist() == pytest.approx([4.7, 3.8, 3.9])
    assert rollout.tensors["advantages"].flatten().tolist() == pytest.approx([4.2, 2.8, 1.9])


def test_rewards_of_turns_are_on_the_running_scale() -> None:
    turn_rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rollout = make_rollout([1.0, 5.0], turn_rewards=turn_rewards)
    config = PpoConfig.for_trainer(**SETTINGS, normalize_scores=True)
    PPOObjective(config).advantages(rollout, SimpleNamespace(in_reward=0.0))  # type: ignore[arg-type]
    # Mean 3 and deviation 2: scores -1 and 1. The turn's 1 is 0.5, so the end of the first response has -1.5 left.
    assert rollout.tensors["rewards"].tolist() == [[0.5, 0.0, -1.5], [0.0, 0.0, 1.0]]


def test_rewards_of_steps_are_a_part_of_the_score() -> None:
    # Two steps: 2 on the first token, -1 on the second. The score is 4, so 3 are left for the end.
    rollout = make_rollout([4.0], step_rewards=torch.tensor([[2.0, -1.0, 0.0]]))
    config = PpoConfig.for_trainer(**SETTINGS | {"gamma": 0.5})
    PPOObjective(config).advantages(rollout, SimpleNamespace(in_reward=0.2))  # type: ignore[arg-type]
    # Each token pays 0.2 * 0.5.
    assert rollout.tensors["rewards"].flatten().tolist() == pytest.approx([1.9, -1.1, 2.9])
    # gamma 0.5, lambda 1: 2.9; -1.1 + 0.5 * 2.9 = 0.35; 1.9 + 0.5 * 0.35 = 2.075. Values are 0.5, 1 and 2.
    assert rollout.tensors["returns"].flatten().tolist() == pytest.approx([2.075, 0.35, 2.9])
    assert rollout.tensors["advantages"].flatten().tolist() == pytest.approx([1.575, -0.65, 0.9])


def test_penalty_and_clip_of_a_score_are_taken_at_its_end() -> None:
    rewards = torch.tensor([[2.0, -1.0, 0.0]])
    rollout = make_rollout([4.0], step_rewards=rewards, finished=torch.zeros(1, dtype=torch.bool))
    config = PpoConfig.for_trainer(**SETTINGS, missing_eos_penalty=5.0, score_clip=3.0)
    PPOObjective(config).advantages(rollout, SimpleNamespace(in_reward=0.0))  # type: ignore[arg-type]
    # 4 is clipped to 3, the missing end costs 5, and the steps have 1 already: the end earns 3 - 5 - 1.
    assert rollout.tensors["rewards"].flatten().tolist() == pytest.approx([2.0, -1.0, -3.0])


def test_whitening_scales_rewards_of_steps_with_the_others() -> None:
    rollout = make_rollout([4.0], step_rewards=torch.tensor([[2.0, -1.0, 0.0]]))
    config = PpoConfig.for_trainer(**SETTINGS, whiten_rewards=True)
    PPOObjective(config).advantages(rollout, SimpleNamespace(in_reward=0.0))  # type: ignore[arg-type]
    # 2, -1 and 3 have the mean 4/3 and the variance 26/9. The mean stays: 4/3 + (r - 4/3) / sqrt(26/9).
    deviation = (26 / 9) ** 0.5
    expected = [4 / 3 + (reward - 4 / 3) / deviation for reward in (2.0, -1.0, 3.0)]
    assert rollout.tensors["rewards"].flatten().tolist() == pytest.approx(expected)


def test_policy_rests_while_the_critic_warms_up() -> None:
    objective = PPOObjective(PpoConfig.for_trainer(**SETTINGS))
    assert [objective.rests_policy(update) for update in range(4)] == [True, True, False, False]
