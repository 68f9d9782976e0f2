"""PPO's losses, as sums over tokens divided by a count the caller gives.

The count is of the whole optimizer step (all micro-batches, all processes), so that neither padding nor the size of a
micro-batch changes the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from align.rl.masking import masked_sum

Aggregation = Literal["token", "sequence", "constant"]
"""``token``: every token weighs the same, so long responses count more. ``sequence``: every response weighs the same,
which under-penalizes long bad ones (arXiv 2503.20783). ``constant``: token sums over responses times the longest length
allowed, so that a token weighs the same in every update, however long its neighbors are (same source)."""

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside any clip range, and still finite in float32 (as in verl and OpenRLHF)."""


@dataclass(frozen=True)
class LossTerms:
    """A loss and what is worth logging about it, as sums over real tokens (detached)."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def aggregate(
    per_token: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float, kind: Aggregation
) -> torch.Tensor:
    """Reduce (B, T) to a scalar: a token sum, or a sum of row means, over ``count`` (see ``loss_count``)."""
    if kind != "sequence":
        return masked_sum(per_token, mask) / count
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return masked_sum(per_token / lengths, mask) / count


def loss_count(masks: Sequence[torch.Tensor], kind: Aggregation, max_tokens: int) -> float:
    """What the loss sums of responses with these (B, T) masks are divided by; see ``Aggregation``.

    Counts of several processes add up. It is 0 where no token is learned from.
    """
    if kind == "token":
        return float(sum(int(mask.sum()) for mask in masks))
    sequences = float(sum(int(mask.any(dim=1).sum()) for mask in masks))
    return sequences * max_tokens if kind == "constant" else sequences


def importance_weights(
    logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    cap: float | None,
    sequence_cap: float | None = None,
) -> torch.Tensor:
    """Weights ``min(pi_trainer / pi_sampler, cap)`` that correct for the engine's rounding; (B, T), no gradient.

    Truncated importance sampling per token: biased but stable. A NaN from the sampler, or ``cap=None``, gives weight 1.
    ``sequence_cap`` c drops whole responses (weight 0) whose ratio over all tokens is outside [1/c, c]: there the
    engine followed another policy, and no weight repairs that.
    """
    known = mask & torch.isfinite(sampler_logprobs)
    gap = torch.where(known, logprobs - sampler_logprobs, torch.zeros_like(logprobs))
    weights = torch.ones_like(logprobs)
    if cap is not None:
        weights = torch.exp(gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).clamp(max=cap)
    if sequence_cap is not None:
        outside = gap.sum(dim=1, keepdim=True).abs() > math.log(sequence_cap)
        weights = torch.where(mask & outside, torch.zeros_like(weights), weights)
    return weights.detach()


def policy_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    *,
    clip_range: float,
    dual_clip: float | None = None,
    weights: torch.Tensor | None = None,
    aggregation: Aggregation = "token",
) -> LossTerms:
    """Clipped surrogate (arXiv 1707.06347, equation 7): ``max(-A rho, -A clip(rho, 1-eps, 1+eps))``.

    ``dual_clip`` c adds, where A < 0, ``min(that, -c A)`` (arXiv 1912.09729), which bounds the loss of a token the new
    policy has made very likely. ``weights`` (B, T) multiply each token's loss. All (B, T).
    """
    log_ratio = (new_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = torch.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    per_token = torch.maximum(plain, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(per_token, -dual_clip * advantages)
        per_token = torch.where(advantages < 0, bounded, per_token)
    if weights is not None:
        per_token = per_token * weights
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask),
            "clipfrac": masked_sum((clipped > plain).to(ratio.dtype), mask),
            "approx_kl": masked_sum(log_ratio**2 / 2, mask),
            "policy_loss": masked_sum(per_token, mask),
        }
    return LossTerms(aggregate(per_token, mask, count, aggregation), sums)


def value_loss(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    *,
    value_clip_range: float | None,
    aggregation: Aggregation = "token",
) -> LossTerms:
    """``1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)``, all (B, T).

    ``value_clip_range`` is eps, in units of reward; None switches clipping off.
    """
    squared = (new_values - returns) ** 2
    clipped = squared
    if value_clip_range is not None:
        near = values + (new_values - values).clamp(-value_clip_range, value_clip_range)
        clipped = (near - returns) ** 2
    per_token = torch.maximum(squared, clipped) / 2
    with torch.no_grad():
        sums = {
            "value_loss": masked_sum(per_token, mask),
            "value_clipfrac": masked_sum((clipped > squared).to(squared.dtype), mask),
        }
    return LossTerms(aggregate(per_token, mask, count, aggregation), sums)
