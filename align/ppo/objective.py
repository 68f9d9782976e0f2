"""What one micro-batch adds to the loss of its optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from align.ppo.losses import aggregate, importance_weights, policy_loss, value_loss
from align.ppo.packing import Batch

if TYPE_CHECKING:
    from align.ppo.config import PPOConfig

LEARNED_FROM = ("logprobs", "sampler_logprobs", "values", "advantages", "returns")
"""Tensors of a rollout that the loss needs."""


def ppo_loss(
    out: Batch,
    learn: Batch,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    args: PPOConfig,
    warming: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss + vf_coef x value loss - entropy_coef x entropy, and sums over tokens to log.

    ``out`` is what the models say now, ``learn`` what the rollout said, ``mask`` (B, T) its real tokens. Each term is a
    sum divided by ``count``, the tokens (or sequences) of the whole optimizer step. Without ``logprobs`` in ``out``
    only the critic learns; while ``warming`` the policy's part counts for nothing, but stays in the graph.
    """
    kind = args.loss_aggregation
    critic = value_loss(
        out["values"][:, :-1],
        learn["values"][:, :-1],
        learn["returns"],
        mask,
        count,
        value_clip_range=args.value_clip_range,
        aggregation=kind,
    )
    loss, sums = args.vf_coef * critic.loss, dict(critic.sums)
    if "logprobs" not in out:
        return loss, sums
    weights = importance_weights(learn["logprobs"], learn["sampler_logprobs"], mask, args.importance_cap)
    policy = policy_loss(
        out["logprobs"],
        learn["logprobs"],
        learn["advantages"],
        mask,
        count,
        clip_range=args.clip_range,
        dual_clip=args.dual_clip,
        weights=weights,
        aggregation=kind,
    )
    part = policy.loss
    if args.entropy_coef:
        part = part - args.entropy_coef * aggregate(out["entropy"], mask, count, kind)
    loss = loss + (0.0 if warming else 1.0) * part
    sums |= {
        **policy.sums,
        "importance_weight": (weights * mask).sum(),
        "policy_loss": policy.loss.detach() * mask.sum(),
    }
    return loss, sums
