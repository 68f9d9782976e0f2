"""KL estimators and controllers, worked by hand."""

import math

import pytest
import torch

from align.rl.rewards import AdaptiveKL, FixedKL, estimate_kl, make_controller

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5]])
# log ratios: 0.5, -1.0, 0.0


def test_k1_is_the_log_ratio_and_may_be_negative():
    assert estimate_kl(LOGPROBS, REFERENCE, "k1").tolist() == [[0.5, -1.0, 0.0]]


def test_k2_is_half_the_square():
    # 0.25 / 2, 1 / 2, 0
    assert estimate_kl(LOGPROBS, REFERENCE, "k2").tolist() == [[0.125, 0.5, 0.0]]


def test_k3_is_never_negative():
    # exp(-0.5) - 1 + 0.5 and exp(1) - 1 - 1
    expected = [math.exp(-0.5) - 0.5, math.e - 2.0, 0.0]
    assert estimate_kl(LOGPROBS, REFERENCE, "k3")[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (policy * (policy.log() - reference.log())).sum()
    mean = (policy * estimate_kl(policy.log(), reference.log(), estimator)).sum()  # expectation over samples of policy
    assert mean.item() == pytest.approx(exact.item(), abs=1e-12)


def test_adaptive_controller_moves_towards_the_target():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl=6.6, episodes=100)
    # error 6.6 / 6 - 1 = 0.1; 0.1 * (1 + 0.1 * 100 / 1000) = 0.101
    assert controller.value == pytest.approx(0.101)
    controller.update(kl=60.0, episodes=100)
    # error clipped to 0.2; 0.101 * 1.02
    assert controller.value == pytest.approx(0.101 * 1.02)
    controller.update(kl=0.0, episodes=100)
    assert controller.value == pytest.approx(0.101 * 1.02 * 0.98)


def test_controllers_survive_a_round_trip():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl=7.0, episodes=64)
    other_controller = make_controller("adaptive", 0.1, 6.0, 1000)
    other_controller.load_state_dict(controller.state_dict())
    assert other_controller.value == controller.value


def test_fixed_controller_stays():
    controller = FixedKL(0.05)
    controller.update(kl=100.0, episodes=64)
    assert controller.value == 0.05
