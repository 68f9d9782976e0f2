"""Rewards per token from scores per response."""

from __future__ import annotations

import torch

from align.rl.kl import estimate_kl
from align.rl.masking import Reduce, last_index, local, whiten


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

    ``length_penalty`` is subtracted per token of ``lengths`` (B,). ``missing_eos_penalty`` is subtracted from responses
    without an end token; it does not replace the score, so that the order among them stays. ``finished`` (B,) is True
    where the last token is EOS.
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


def whiten_rewards(rewards: torch.Tensor, response_mask: torch.Tensor, reduce: Reduce = local) -> torch.Tensor:
    """Scale token rewards (B, T) to variance 1, keeping their mean (arXiv 2403.17031, detail 11). B is at least 8."""
    return whiten(rewards, response_mask, shift_mean=False, reduce=reduce)
