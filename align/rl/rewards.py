"""Rewards per token from scores per response, the running scale of scores, and the KL of the policy to the reference.

As a reward only the estimator k1 has the right gradient, as a loss only k2; k3 in the loss has the gradient of the
reverse KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from align.rl.masking import last_index

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


class FixedKL:
    """A constant coefficient of the KL penalty."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, episodes: int) -> None:
        """Adapt to the mean KL of ``episodes`` responses, in nats per response; here the value stays the same."""

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


def make_controller(kind: Literal["fixed", "adaptive"], value: float, target: float, horizon: int) -> FixedKL:
    """Return the controller that the settings ask for."""
    return AdaptiveKL(value, target, horizon) if kind == "adaptive" else FixedKL(value)


def adjust_scores(
    scores: torch.Tensor,
    finished: torch.Tensor,
    *,
    missing_eos_penalty: float | None = None,
    score_clip: float | None = None,
    length_penalty: float = 0.0,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return scores (B,) clipped to [-score_clip, score_clip], minus the penalties; the input is not changed.

    ``length_penalty`` is subtracted per token of ``lengths`` (B,), the sampled tokens. ``missing_eos_penalty`` is
    subtracted from responses that were cut off; it does not replace the score, which preserves the order among them.
    ``finished`` (B,) is False if a response has no EOS, or if an episode was cut off, whatever its last token.
    """
    # Clipping first: a penalty must not vanish for a score at the edge of the range.
    adjusted = scores.clone() if score_clip is None else scores.clamp(-score_clip, score_clip)
    if length_penalty and lengths is not None:
        adjusted = adjusted - length_penalty * lengths.to(scores.dtype)
    if missing_eos_penalty:
        adjusted = adjusted - missing_eos_penalty * (~finished).to(scores.dtype)
    return adjusted


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    response_mask: torch.Tensor,
    kl_coef: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token rewards and the KL estimate per token, both (B, T).

    Each real token pays ``kl_coef`` per nat of drift from the reference. The last real token (the EOS token itself, not
    the slot after it) also earns the score. ``scores`` is (B,), the other tensors are (B, T), right-padded, with at
    least one real token per row. Source: arXiv 1909.08593, equation 2, with the k1 estimator.
    """
    kl = torch.where(response_mask, estimate_kl(logprobs, ref_logprobs), logprobs.new_zeros(()))
    rewards = -kl_coef * kl
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_index(response_mask)] += scores  # GAE carries the score back to the earlier tokens
    return rewards, kl


class RunningScale:
    """Mean and standard deviation of all scores so far (Chan et al. 1979, one pass per batch).

    Reward models differ in scale, while KL and clip ranges are in units of score.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0
        """Sum of squared deviations from the mean."""

    def add(self, scores: torch.Tensor) -> None:
        """Add a batch of scores (B,)."""
        if not len(scores):
            return
        # Merge the batch's mean and squares into the running values; the shift between the means adds to the squares.
        values = scores.double()
        batch_mean = float(values.sum()) / len(values)
        batch_squares = float(((values - batch_mean) ** 2).sum())
        shift = batch_mean - self.mean
        total_count = self.count + len(values)
        self.squares += batch_squares + shift**2 * self.count * len(values) / total_count
        self.mean += shift * len(values) / total_count
        self.count = total_count

    @property
    def std(self) -> float:
        """Population standard deviation; 0 as long as all scores were equal."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Return ``(scores - mean) / std``, (B,), of scores (B,); undivided as long as all scores were equal."""
        return (scores - self.mean) / (self.std or 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = (float(state[name]) for name in ("count", "mean", "squares"))
