"""KL of the policy to the reference: estimators, and controllers of the penalty's coefficient.

As a reward only k1 has the right gradient, as a loss only k2; k3 in the loss has the gradient of the reverse KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Estimator = Literal["k1", "k2", "k3"]


def estimate_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Estimator = "k1") -> torch.Tensor:
    """Return estimates of KL(policy || reference) per token, (B, T), in nats, from tokens that the policy sampled.

    ``logprobs`` and ``ref_logprobs`` are (B, T). With l = logprobs - ref_logprobs: k1 = l (unbiased, may be negative),
    k2 = l^2/2 (biased), k3 = exp(-l) - 1 + l (unbiased, never negative). Source: joschu.net/blog/kl-approx. As a reward
    only k1 is right: the gradient that k2 and k3 give there nearly vanishes close to the reference.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    # k1 with a control variate of mean 0: never negative, and of lower variance.
    return torch.exp(-log_ratio) - 1 + log_ratio


@dataclass(frozen=True)
class KLPenalty:
    """Coefficients of the KL penalty during one update; at least one is 0."""

    in_reward: float = 0.0
    """Reward lost per nat of drift from the reference."""
    in_loss: float = 0.0
    """Weight of the KL term of the loss."""


class KLController(Protocol):
    """Holds the coefficient of the KL penalty."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Take the mean KL of ``episodes`` responses, in nats per response, into account."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedKL:
    """A constant coefficient."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, episodes: int) -> None:
        """Keep the coefficient."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


class AdaptiveKL(FixedKL):
    """Ziegler's proportional controller (arXiv 1909.08593, section 2.2).

    ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon``. ``target`` is in nats *per response* (6 for
    24 tokens there), ``horizon`` in responses. A target for token means does not transfer.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Raise the coefficient when the KL is above the target, lower it when below, by at most 20 % per horizon."""
        # Limit the relative error, so a single update cannot swing the coefficient.
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * episodes / self.horizon


def make_controller(kind: Literal["fixed", "adaptive"], value: float, target: float, horizon: int) -> KLController:
    """Return the controller that the settings ask for."""
    return AdaptiveKL(value, target, horizon) if kind == "adaptive" else FixedKL(value)
