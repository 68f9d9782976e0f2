"""Failed episodes leave the statistics of an update, and forced tokens cost nothing: worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.config.stages.policy_gradient import GrpoConfig, PpoConfig, RlooConfig
from align.environments.episode import Episode, PolicyTurn
from align.rl.metrics import Averages, add_rollout, finish
from align.rl.objectives.grpo import GRPOObjective, RLOOObjective
from align.rl.objectives.ppo import PPOObjective
from align.rl.rewards import KLPenalty
from align.rl.rollout import Rollout
from align.rl.scores import add_environment_scores

FREE = KLPenalty()


def make_rollout(scores: list[float], groups: list[int], failed: list[bool], width: int = 1) -> Rollout:
    """Return responses of ``width`` sampled tokens each, at the reference."""
    count = len(scores)
    zeros = torch.zeros(count, width)
    tensors = {
        "scores": torch.tensor(scores),
        "finished": torch.ones(count, dtype=torch.bool),
        "failed": torch.tensor(failed),
        "response_mask": torch.ones(count, width, dtype=torch.bool),
        **{name: zeros.clone() for name in ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy")},
        "values": torch.zeros(count, width + 1),
    }
    texts = [str(number) for number in range(count)]
    return Rollout(0, [{}] * count, groups, [[1]] * count, [[2] * width] * count, texts, tensors)


def test_failed_group_leaves_the_batch_deviation() -> None:
    # Judged: 10 and 12, and 4 and 6. Deviations from 8 are 2, 4, -4, -2: the sample deviation is sqrt(40 / 3).
    scores = [10.0, 12.0, 4.0, 6.0, 0.0, 0.0]
    rollout = make_rollout(scores, [0, 0, 1, 1, 2, 2], [False] * 4 + [True] * 2)
    config = GrpoConfig.for_trainer(learning_rate=1e-6, scale_rewards="batch")
    GRPOObjective(config).advantages(rollout, FREE)
    expected = 1 / ((40 / 3) ** 0.5 + 1e-4)
    advantages = rollout.tensors["advantages"].flatten().tolist()
    assert advantages == pytest.approx([-expected, expected, -expected, expected, 0, 0])


def test_failed_episode_is_in_no_leave_one_out_baseline() -> None:
    # Of 1, 2 and 6 each is compared with the mean of the other two: 1 - 4, 2 - 3.5, 6 - 1.5.
    rollout = make_rollout([1.0, 2.0, 6.0, 3.0], [0] * 4, [False] * 3 + [True])
    config = RlooConfig.for_trainer(learning_rate=1e-6, whiten_advantages=False, length_penalty=0.5)
    RLOOObjective(config).advantages(rollout, FREE)
    assert rollout.tensors["advantages"].flatten().tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0])


def test_failed_episodes_are_not_whitened_with_the_others() -> None:
    # Judged advantages -2 and 2: the sample deviation is sqrt(8).
    rollout = make_rollout([1.0, 3.0, 0.0, 0.0], [0, 0, 1, 1], [False] * 2 + [True] * 2)
    config = RlooConfig.for_trainer(learning_rate=1e-6, whiten_advantages=True)
    RLOOObjective(config).advantages(rollout, FREE)
    expected = 2 / (8**0.5 + 1e-4)
    assert rollout.tensors["advantages"].flatten().tolist() == pytest.approx([-expected, expected, 0, 0])


def test_failed_episodes_leave_the_running_scale() -> None:
    # Judged scores 8 and 12: mean 10, deviation 2.
    rollout = make_rollout([8.0, 12.0, 0.0, 0.0], [0, 0, 1, 1], [False] * 2 + [True] * 2)
    config = PpoConfig.for_trainer(learning_rate=1e-6, normalize_scores=True, whiten_advantages=False)
    objective = PPOObjective(config)
    objective.advantages(rollout, FREE)
    assert objective.scale is not None
    assert (objective.scale.count, objective.scale.mean, objective.scale.std) == (2, 10, 2)
    assert rollout.tensors["rewards"][:2].flatten().tolist() == [-1.0, 1.0]


def test_rewards_are_whitened_without_failed_episodes() -> None:
    # Judged rewards 1 and 5: deviation 2 around 3, the mean stays: 3 - 1 and 3 + 1.
    rollout = make_rollout([1.0, 5.0, 0.0, 0.0], [0, 0, 1, 1], [False] * 2 + [True] * 2)
    config = PpoConfig.for_trainer(learning_rate=1e-6, whiten_rewards=True, whiten_advantages=False)
    PPOObjective(config).advantages(rollout, FREE)
    assert rollout.tensors["rewards"][:2].flatten().tolist() == pytest.approx([2.0, 4.0])


def test_metrics_are_of_judged_episodes() -> None:
    rollout = make_rollout([1.0, 3.0, 0.0, 0.0], [0, 0, 1, 1], [False] * 2 + [True] * 2)
    rollout.tensors["kl"] = torch.tensor([[0.5], [1.5], [9.0], [9.0]])
    rollout.tensors["score_part"] = torch.tensor([2.0, 4.0, 7.0, 7.0])
    rollout.tensors["gold"] = torch.tensor([0.0, 1.0, 5.0, 5.0])
    rollout.tensors["entropy"] = torch.tensor([[1.0], [2.0], [8.0], [8.0]])
    rollout.tensors["returns"] = torch.tensor([[1.0], [3.0], [0.0], [0.0]])
    averages = Averages()
    numbers = add_rollout(averages, rollout)
    means = finish(averages.means(lambda totals: totals))
    assert numbers["score_range"] == 2.0 and numbers["explained_variance"] == 0.0
    expected = {
        "score": 2.0,
        "score_std": 1.0,
        "score_part": 3.0,
        "gold": 0.5,
        "kl": 1.0,
        "entropy": 1.5,
        "return": 2.0,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected)


def test_scorer_gives_a_failed_episode_no_other_score() -> None:
    # The environment scores 1 and 3, the scorer 10 each and 50 for the text of the failed episode: (11 + 13) / 2.
    rollout = make_rollout([10.0, 10.0, 50.0], [0, 0, 0], [False, False, True])
    turn = PolicyTurn(token_ids=[2], logprobs=[0.0], finished=True, text="")
    options: dict[str, Any] = {"prompt_ids": [1], "turns": [turn]}
    stops = [("finished", 1.0), ("finished", 3.0), ("failed", 0.0)]
    rollout.episodes = [Episode(stop=stop, score=score, **options) for stop, score in stops]
    add_environment_scores(rollout)
    assert rollout.tensors["scores"].tolist() == [11.0, 13.0, 12.0]


def test_overlong_penalty_counts_only_sampled_tokens() -> None:
    # max_tokens 4, buffer 2: four sampled tokens cost 1, two sampled ones and two forced ones cost nothing.
    rollout = make_rollout([0.0, 0.0], [0, 0], [False] * 2, width=4)
    rollout.tensors["response_mask"][1, 2:] = False
    config = GrpoConfig.for_trainer(learning_rate=1e-6, max_tokens=4, overlong_buffer=2, scale_rewards="none")
    GRPOObjective(config).advantages(rollout, FREE)
    assert rollout.tensors["rewards"].tolist() == [-1.0, 0.0]
