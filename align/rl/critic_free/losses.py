"""Losses without a critic, as sums divided by a count the caller gives, as PPO's are (``align.rl.ppo.losses``)."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from align.rl.masking import masked_sum
from align.rl.ppo.losses import LOG_RATIO_LIMIT, Aggregation, LossTerms, aggregate

RatioOf = Literal["token", "sequence", "whole"]
"""Whose probabilities are compared: ``token``; ``sequence``, the geometric mean over a response's tokens (arXiv
2507.18071, equation 7); ``whole``, their product, the response's own probability (arXiv 2402.14740)."""
PairLoss = Literal["sigmoid", "ipo", "hinge"]


def log_ratios(new_logprobs: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor, of: RatioOf) -> torch.Tensor:
    """Log of the probability ratio, new to old: (B, T) for tokens, else (B, 1)."""
    gap = torch.where(mask, new_logprobs - logprobs, new_logprobs.new_zeros(()))
    if of != "token":
        gap = gap.sum(dim=1, keepdim=True)
        gap = gap / mask.sum(dim=1, keepdim=True).clamp(min=1) if of == "sequence" else gap
    return gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def group_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    *,
    clip: tuple[float, float],
    of: RatioOf = "token",
    clips: bool = True,
    weights: torch.Tensor | None = None,
    aggregation: Aggregation = "token",
) -> LossTerms:
    """PPO's surrogate with a range for falls and one for rises: ``-min(A rho, A clip(rho, 1 - low, 1 + high))``.

    Without ``clips`` it is ``-min(rho, 1 + high) A log pi`` with the ratio as a weight that has no gradient (CISPO,
    arXiv 2506.13585, equation 4). ``advantages`` (B, T), one number a response; ``weights`` (B, T) multiply each
    token's loss. All logarithms (B, T).
    """
    low, high = clip
    log_ratio = log_ratios(new_logprobs, logprobs, mask, of)
    ratio = torch.exp(log_ratio)
    if clips:
        plain = -advantages * ratio
        per_token = torch.maximum(plain, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
        touched = per_token > plain
    else:
        per_token = -advantages * ratio.clamp(max=1.0 + high).detach() * new_logprobs
        touched = (ratio > 1.0 + high).expand_as(mask)
    if weights is not None:
        per_token = per_token * weights
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio.expand_as(mask), mask),
            "clipfrac": masked_sum(touched.to(ratio.dtype), mask),
            "approx_kl": masked_sum((log_ratio**2 / 2).expand_as(mask), mask),
            "policy_loss": masked_sum(per_token, mask),
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
    """DPO's loss over pairs that stand one after the other (arXiv 2305.18290, equation 7; IPO: 2310.12036).

    Equal to stage ``dpo``'s (trl) on the same numbers. IPO's margin is of means over each response's tokens, so that
    one target fits all lengths; that is how its authors computed the paper's results, as trl's source says.
    ``sides`` (B, 1) is 1 for the better response, -1 for the worse, 0 for both of a tie, which counts for nothing.
    ``count`` is of pairs; sums are over pairs too.
    """
    drift = torch.where(mask, new_logprobs - ref_logprobs, new_logprobs.new_zeros(())).sum(dim=1)  # (B,)
    margins = _margins(drift, sides)
    decided = sides.view(-1, 2).ne(0).all(dim=1)
    if kind == "sigmoid":
        right, wrong = functional.logsigmoid(beta * margins), functional.logsigmoid(-beta * margins)
        per_pair = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif kind == "ipo":
        per_token = drift / mask.sum(dim=1).clamp(min=1)
        per_pair = (_margins(per_token, sides) - 1 / (2 * beta)) ** 2
    else:
        per_pair = torch.relu(1 - beta * margins)
    with torch.no_grad():
        sums = {
            "accuracy": masked_sum((margins > 0).float(), decided),
            "margin": masked_sum(beta * margins, decided),
            "pair_loss": masked_sum(per_pair, decided),
        }
    return LossTerms(masked_sum(per_pair, decided) / count, sums)


def _margins(values: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """The better response's value less the worse one's, (B / 2,), of (B,) values."""
    return (sides.squeeze(1) * values).view(-1, 2).sum(dim=1)
