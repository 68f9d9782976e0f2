"""Metrics worked by hand."""

import pytest
import torch

from align.environments.episode import CallRecord, Episode, PolicyTurn
from align.rl.metrics import Averages, add_episodes, correlation, finish, identical_answers, rollout_statistics
from align.rl.rollout import Rollout


def test_correlation_of_scores_and_lengths():
    # deviations -1, 0, 1 and -2, 1, 1: covariance sum 3, squares 2 and 6
    actual = correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 3, 3]))
    assert actual == pytest.approx(3 / 12**0.5)
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([1, 2])) == 0.0


def test_an_average_over_nothing_is_zero():
    averages = Averages()
    averages.add("ratio", torch.tensor(0.0), torch.tensor(0))
    averages.add("score", torch.tensor(6.0), torch.tensor(3))
    assert averages.means(lambda totals: totals) == {"ratio": 0.0, "score": 2.0}


def test_deviations_come_from_means_of_squares():
    # Scores 1, 2 and 3: mean 2, mean square 14 / 3, variance 2 / 3. Rounding made the variance of kl negative.
    means = {"score": 2.0, "score_square": 14 / 3, "kl": 0.1, "kl_square": 0.1**2 - 1e-18}
    assert finish(means) == {"score": 2.0, "score_std": pytest.approx((2 / 3) ** 0.5), "kl": 0.1, "kl_std": 0.0}


@pytest.mark.parametrize(("is_prefetched", "speed"), [(False, 10.0), (True, 2.5)])
def test_sampling_speed_is_tokens_per_second_of_sampling(is_prefetched, speed):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    per_token = dict.fromkeys(("logprobs", "ref_logprobs", "sampler_logprobs", "entropy"), torch.zeros(2, 3))
    rollout = Rollout(
        update=3,
        rows=[{}, {}],
        groups=[0, 0],
        prompts=[[1], [1]],
        responses=[[2, 3], [2, 4, 3]],
        texts=["a", "b"],
        tensors={
            "response_mask": mask,
            **per_token,
            "kl": torch.zeros(2),
            "scores": torch.tensor([1.0, 4.0]),
            "finished": torch.tensor([True, False]),
            "weights_update": torch.full((2, 3), 1),
        },
        seconds={"sampling": 0.5, "scoring": 0.25},
        sampling_seconds=2.0,
    )
    statistics = rollout_statistics(Averages(), rollout, is_prefetched)
    # 5 tokens in the half second of this update, or in the 2 seconds in the background
    assert statistics["sampled_tokens_per_second"] == speed
    assert (statistics["seconds_sampling"], statistics["seconds_scoring"]) == (0.5, 0.25)
    assert statistics.get("staleness") == (2.0 if is_prefetched else None)
    assert statistics["score_range"] == 3.0


def test_metrics_of_episodes():
    turn = PolicyTurn([1, 2], [-1.0, -1.0], True, "")
    episodes = [
        Episode(
            [1],
            [turn, turn],
            [[7, 8, 9]],
            calls=[CallRecord(0, "add", {}, "3", "", 0.5), CallRecord(0, "", {}, "no", "malformed")],
            turn_scores=[0.0, 1.0],
        ),
        Episode([1], [turn], stop="max_turns", calls=[CallRecord(0, "sub", {}, "no", "arguments")], turn_scores=[0.5]),
    ]
    averages = Averages()
    add_episodes(averages, episodes)
    # 3 turns, 7 + 2 tokens, 3 calls over 2 episodes; the first turns score 0 and 0.5, the only second one 1.
    assert averages.means(lambda totals: totals) == {
        "turns": 1.5,
        "episode_tokens": 4.5,
        "calls": 1.5,
        "malformed_calls": 0.5,
        "tool_errors": 0.5,
        "tool_seconds": 0.25,
        "max_turns_rate": 0.5,
        "failure_rate": 0.0,
        "score_turn_1": 0.25,
        "score_turn_2": 1.0,
    }


def test_identical_answers_are_those_of_other_prompts():
    groups = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    answers = ["a", "a", "b", "c", "a", "a", "d", "d", "e", "f"]
    # The most common answers are a, a, d and e: two of four prompts share theirs.
    assert identical_answers(groups, answers) == 0.5
    assert identical_answers([0, 0], ["a", "a"]) == 0.0
