"""A shipped loss of sampled responses on plain tensors."""

from __future__ import annotations

import torch

from align.methods.call import Method
from align.methods.losses import POLICY_LOSSES
from align.methods.records import ResponseTokens
from align.rl.losses import Aggregation, LossTerms
from align.rl.objectives.policy import PolicyLoss

CLIP = {"low": 0.2, "high": 0.2}


def make_tokens(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> ResponseTokens:
    """Return a record without critic and groups; the sampler and the reference are the old policy. All are (B, T)."""
    return ResponseTokens(new, old, old, old, advantages, torch.zeros_like(old), mask, torch.arange(len(mask)))


def policy_loss(
    tokens: ResponseTokens,
    count: torch.Tensor | float,
    *,
    name: str = "ppo",
    weights: torch.Tensor | None = None,
    aggregation: Aggregation = "token",
    **options: float,
) -> LossTerms:
    """Return the terms of the loss ``name``, by default with a clip range of 0.2."""
    loss = PolicyLoss(Method(POLICY_LOSSES[name], options or CLIP), aggregation)
    return loss(tokens, count, weights)
