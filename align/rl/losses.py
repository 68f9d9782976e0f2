"""Losses over sampled responses, as sums divided by a count that the caller passes.

The count covers the entire optimizer step (all micro-batches, all processes), so neither padding nor the size of a
micro-batch changes the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from align.rl.masking import masked_sum

Aggregation = Literal["token", "sequence", "constant"]
"""``token``: every token weighs the same, so long responses count more. ``sequence``: every response weighs the same,
which under-penalizes long bad ones (arXiv 2503.20783). ``constant``: token sums over responses times the maximum
length. A token then weighs the same in every update, however long the other responses are (same source)."""
RatioLevel = Literal["token", "sequence", "response"]
"""Level of the probability ratio. ``token``: per token. ``sequence``: the geometric mean over a response's tokens
(arXiv 2507.18071, equation 7). ``response``: their product, the response's own probability (arXiv 2402.14740)."""
PairLoss = Literal["sigmoid", "ipo", "hinge"]

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside any clip range, and still finite in float32 (as in verl and OpenRLHF)."""


@dataclass(frozen=True)
class LossTerms:
    """A loss, and quantities to log as sums over real tokens (detached)."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


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


def log_ratios(
    new_logprobs: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor, level: RatioLevel
) -> torch.Tensor:
    """Return the log of the probability ratio, new to old: (B, T) for tokens, else (B, 1). All inputs are (B, T)."""
    gap = torch.where(mask, new_logprobs - logprobs, new_logprobs.new_zeros(()))
    if level != "token":
        gap = gap.sum(dim=1, keepdim=True)
    if level == "sequence":
        gap = gap / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    *,
    clip: tuple[float, float],
    dual_clip: float | None = None,
    level: RatioLevel = "token",
    clips: bool = True,
    weights: torch.Tensor | None = None,
    aggregation: Aggregation = "token",
) -> LossTerms:
    """Return PPO's clipped surrogate (arXiv 1707.06347, equation 7): ``-min(A rho, A clip(rho, 1-low, 1+high))``.

    All tensors are (B, T).

    Args:
        clip: The clip ranges below and above 1, ``(low, high)``.
        dual_clip: c; if A < 0, the loss is at most ``-c A`` (arXiv 1912.09729), which bounds the loss of a token that
            the new policy has made very likely.
        level: Level of the ratio; ``advantages`` are constant over a response unless it is ``token``.
        clips: False for ``-min(rho, 1 + high) A log pi`` with the ratio as a weight without gradient (CISPO, arXiv
            2506.13585, equation 4).
        weights: Factor of each token's loss.
    """
    low, high = clip
    # At sequence and response level there is one ratio per response, (B, 1), which broadcasts over its tokens.
    log_ratio = log_ratios(new_logprobs, logprobs, mask, level)
    ratio = torch.exp(log_ratio)
    if clips:
        unclipped = -advantages * ratio
        # The larger loss is pessimistic: clipping removes gain, never loss.
        per_token = torch.maximum(unclipped, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
        is_clipped = per_token > unclipped
    else:
        # The gradient flows only through log pi, so a capped token keeps the gradient that a clip would remove.
        per_token = -advantages * ratio.clamp(max=1.0 + high).detach() * new_logprobs
        is_clipped = (ratio > 1.0 + high).expand_as(mask)
    if dual_clip is not None:
        # With a negative advantage the surrogate grows without limit as the ratio does; dual clip bounds it.
        bounded = torch.minimum(per_token, -dual_clip * advantages)
        per_token = torch.where(advantages < 0, bounded, per_token)
    if weights is not None:
        per_token = per_token * weights
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio.expand_as(mask), mask),
            "clipfrac": masked_sum(is_clipped.to(ratio.dtype), mask),
            "approx_kl": masked_sum((log_ratio**2 / 2).expand_as(mask), mask),
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


def pair_loss(
    new_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    sides: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    *,
    kind: PairLoss,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossTerms:
    """Return DPO's loss over pairs of neighboring rows (arXiv 2305.18290, equation 7; IPO: 2310.12036).

    Equal to the loss of stage ``dpo`` (trl) on the same numbers. IPO's margin uses means over each response's tokens,
    so a single target fits all lengths. Its authors computed the paper's results this way, as trl's source says.
    Log-probabilities and ``mask`` are (B, T). ``sides`` (B, 1) is 1 for the better response, -1 for the worse, 0 for
    both of a tie, which has no loss. ``count`` and the logged sums are over pairs.
    """
    # A row's drift is log pi - log pi_ref of the response, beta times which is DPO's implicit reward.
    drift = torch.where(mask, new_logprobs - ref_logprobs, new_logprobs.new_zeros(())).sum(dim=1)  # (B,)
    margins = _margins(drift, sides)
    is_decided = sides.view(-1, 2).ne(0).all(dim=1)
    if kind == "sigmoid":
        right = functional.logsigmoid(beta * margins)
        wrong = functional.logsigmoid(-beta * margins)
        # Label smoothing assumes that this share of the pairs has swapped labels.
        per_pair = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif kind == "ipo":
        # Per token, or long responses would need a larger drift for the same margin.
        mean_drift = drift / mask.sum(dim=1).clamp(min=1)
        per_pair = (_margins(mean_drift, sides) - 1 / (2 * beta)) ** 2
    else:
        per_pair = torch.relu(1 - beta * margins)
    with torch.no_grad():
        sums = {
            "accuracy": masked_sum((margins > 0).float(), is_decided),
            "margin": masked_sum(beta * margins, is_decided),
            "pair_loss": masked_sum(per_pair, is_decided),
        }
    return LossTerms(masked_sum(per_pair, is_decided) / count, sums)


def _margins(values: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Return the better response's value minus the worse response's, (B / 2,), of (B,) values."""
    return (sides.squeeze(1) * values).view(-1, 2).sum(dim=1)
