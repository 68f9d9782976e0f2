"""Generalized advantage estimation over response tokens (arXiv 1506.02438, equation 16)."""

from __future__ import annotations

from typing import Literal

import torch

from align.rl.masking import Reduce, last_index, local, masked_mean_var, whiten

Truncation = Literal["bootstrap", "terminal"]
"""What follows a response cut at its maximum length: the critic's value of the state reached, or nothing."""


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    finished: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    truncation: Truncation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both (B, T), zero on padding.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``; ``return = A + V``.
    ``rewards`` is (B, T). ``values`` is (B, T+1): ``values[:, t]`` is the value of the state *before* token t and the
    column after a row's last real token the value of the state it ended in. That one counts as zero after EOS
    (``finished``), as the episode is over; after truncation it is used (``bootstrap``, arXiv 1712.00378) or also
    zero (``terminal``). Nothing read beyond it: values past a row's end cannot leak in.
    """
    batch, width = rewards.shape
    last = last_index(response_mask)  # (B,)
    rows = torch.arange(batch, device=rewards.device)
    after_end = values[rows, last + 1]  # (B,) value of the state each response ended in
    after_end = torch.where(finished, torch.zeros_like(after_end), after_end)
    if truncation == "terminal":
        after_end = torch.zeros_like(after_end)

    advantages = torch.zeros_like(rewards)
    next_value = after_end
    next_advantage = torch.zeros_like(after_end)
    for t in range(width - 1, -1, -1):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        # On padding both are carried unchanged, so that a row's recursion starts at its own last token.
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, advantage, advantages[:, t])
    returns = torch.where(response_mask, advantages + values[:, :-1], torch.zeros_like(advantages))
    return advantages, returns


def whiten_advantages(advantages: torch.Tensor, response_mask: torch.Tensor, reduce: Reduce = local) -> torch.Tensor:
    """Mean zero and variance one over the real tokens of the whole rollout, on all processes together."""
    return whiten(advantages, response_mask, shift_mean=True, reduce=reduce)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, response_mask: torch.Tensor, reduce: Reduce = local
) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 is a perfect critic, below 0 is worse than a constant.

    ``values`` and ``returns`` are (B, T). Zero when the returns do not vary.
    """
    _, variance = masked_mean_var(returns, response_mask, reduce)
    _, residual = masked_mean_var(returns - values, response_mask, reduce)
    return 0.0 if float(variance) == 0.0 else float(1.0 - residual / variance)
