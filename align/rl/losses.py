"""Losses over sampled responses, as sums divided by a count that the caller passes.

The count covers the entire optimizer step (all micro-batches, all processes), so neither padding nor the size of a
micro-batch changes the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from align.methods.records import LOG_RATIO_LIMIT
from align.rl.masking import masked_sum

Aggregation = Literal["token", "sequence", "constant"]
"""``token``: every token weighs the same, so long responses count more. ``sequence``: every response weighs the same,
which under-penalizes long bad ones (arXiv 2503.20783). ``constant``: token sums over responses times the maximum
length. A token then weighs the same in every update, however long the other responses are (same source)."""


@dataclass(frozen=True)
class LossTerms:
    """A loss, and quantities to log as sums over real tokens (detached)."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    others: dict[str, tuple[torch.Tensor | float, int]] = field(default_factory=dict)
    """Metrics of an own loss that are not per token: their sums and counts."""


def aggregate(
    per_token: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float, kind: Aggregation
) -> torch.Tensor:
    """Reduce (B, T) to a scalar: a token sum, or a sum of row means, over ``count`` (see ``loss_count``)."""
    if kind != "sequence":
        return masked_sum(per_token, mask) / count
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Divide each token by its response's length first: the sum over a row is then its mean.
    return masked_sum(per_token / lengths, mask) / count


def loss_count(masks: Sequence[torch.Tensor], kind: Aggregation, max_tokens: int) -> float:
    """Return the divisor of the loss sums of responses with these (B, T) masks; see ``Aggregation``.

    Counts of several processes add up. The divisor is 0 if no token is learned from.
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
    """Return ``min(pi_trainer / pi_sampler, cap)`` per token, (B, T), without gradient; corrects the engine's rounding.

    Truncated importance sampling: biased but stable. All inputs are (B, T). A NaN of the sampler, or ``cap=None``,
    gives weight 1. ``sequence_cap`` c drops responses (weight 0) whose ratio over all tokens is outside [1/c, c]: there
    the engine followed another policy, and no weight repairs that.
    """
    # Tokens without a number from the sampler get a log-ratio of 0, so weight 1.
    is_known = mask & torch.isfinite(sampler_logprobs)
    gap = torch.where(is_known, logprobs - sampler_logprobs, torch.zeros_like(logprobs))
    weights = torch.ones_like(logprobs)
    if cap is not None:
        weights = torch.exp(gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).clamp(max=cap)
    if sequence_cap is not None:
        # A response whose total probability is far off is dropped as a unit, because single tokens are no evidence.
        is_outside = gap.sum(dim=1, keepdim=True).abs() > math.log(sequence_cap)
        weights = torch.where(mask & is_outside, torch.zeros_like(weights), weights)
    return weights.detach()


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
    """Return ``1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2)``; all tensors are (B, T).

    ``value_clip_range`` is eps, in units of reward; None switches clipping off.
    """
    squared = (new_values - returns) ** 2
    clipped = squared
    if value_clip_range is not None:
        # A critic that moved further than the range gets no gradient if moving helped.
        near = values + (new_values - values).clamp(-value_clip_range, value_clip_range)
        clipped = (near - returns) ** 2
    # The larger one again: clipping may only make the loss more cautious.
    per_token = torch.maximum(squared, clipped) / 2
    with torch.no_grad():
        sums = {
            "value_loss": masked_sum(per_token, mask),
            "value_clipfrac": masked_sum((clipped > squared).to(squared.dtype), mask),
        }
    return LossTerms(aggregate(per_token, mask, count, aggregation), sums)
