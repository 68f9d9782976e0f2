"""What one micro-batch adds to the loss of its optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from align.rl.kl import estimate_kl
from align.rl.packing import Batch
from align.rl.ppo.losses import aggregate, importance_weights, policy_loss, value_loss

if TYPE_CHECKING:
    from align.rl.ppo.config import PPOConfig

LEARNED_FROM = ("logprobs", "sampler_logprobs", "ref_logprobs", "values", "advantages", "returns", "learn_mask")
"""Tensors of a rollout that the loss needs."""


def ppo_loss(
    out: Batch,
    learn: Batch,
    mask: torch.Tensor,
    count: torch.Tensor | float,
    args: PPOConfig,
    warming: bool,
    kl_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss + vf_coef x value loss - entropy_coef x entropy (+ kl_coef x KL), and sums over tokens to log.

    ``out`` is what the models say now, ``learn`` what the rollout said, ``mask`` (B, T) the tokens learned from. Each
    term is a sum divided by ``count``, the tokens (or sequences) of the whole optimizer step. Without ``logprobs`` in
    ``out`` only the critic learns, without ``values`` only the policy; while ``warming`` the policy's part counts for
    nothing, but stays in the graph.
    ``kl_coef`` is that of a KL term in the loss. Its gradient is that of the KL (k2) at the rollout's weights, and
    an approximation after steps away from them.
    """
    kind = args.loss_aggregation
    loss, sums = mask.new_zeros((), dtype=torch.float32), {}
    if "values" in out:
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
    weights = importance_weights(
        learn["logprobs"], learn["sampler_logprobs"], mask, args.importance_cap, args.importance_sequence_cap
    )
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
    if kl_coef and args.kl_estimator:
        drift = estimate_kl(out["logprobs"], learn["ref_logprobs"], args.kl_estimator)
        part = part + kl_coef * aggregate(drift, mask, count, kind)
    loss = loss + (0.0 if warming else 1.0) * part
    sums |= {**policy.sums, "importance_weight": (weights * mask).sum()}
    return loss, sums
