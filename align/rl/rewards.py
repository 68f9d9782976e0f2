"""From scores (one per response) to rewards (one per token)."""

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
    """Clip scores to [-score_clip, score_clip], then subtract the penalties.

    ``length_penalty`` is subtracted per token of ``lengths`` (B,); ``missing_eos_penalty`` from responses that never
    ended, not put in the score's place, so that the order among them stays. ``scores`` (B,), ``finished`` (B,) bool,
    True where the last token is EOS. The input is left as it was.
    """
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
    """Spread one score per response over its tokens; returns rewards and the KL estimate, both (B, T).

    Each real token pays ``kl_coef`` per nat of drift from the reference; the last real token (the EOS token itself, not
    the slot after it) also earns the score. ``scores`` is (B,), the rest (B, T), right-padded, at least one real token
    per row. Source: arXiv 1909.08593, equation 2, with the k1 estimator.
    """
    kl = torch.where(response_mask, estimate_kl(logprobs, ref_logprobs), logprobs.new_zeros(()))
    rewards = -kl_coef * kl
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_index(response_mask)] += scores
    return rewards, kl


def whiten_rewards(rewards: torch.Tensor, response_mask: torch.Tensor, reduce: Reduce = local) -> torch.Tensor:
    """Scale token rewards to variance one and keep their mean (arXiv 2403.17031, detail 11). At least 8 responses."""
    return whiten(rewards, response_mask, shift_mean=False, reduce=reduce)
