"""The critic: a model of its own with one value per token, started from the reward model or from the policy.

With adapters its frozen weights are the very tensors of the model it started from, so it costs an adapter and a head.
Or it is a head on the policy's own trunk and nothing else.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from align.config.tuning import TuningBase
from align.errors import UserError
from align.models.tuning.apply import apply_tuning


class Critic(nn.Module):
    """A trunk and a linear head. The head always computes in float32: bf16 would round values to 8 bits.

    Without a trunk it reads the policy's hidden states: it then costs one vector, and nothing to run.
    """

    def __init__(self, trunk: nn.Module | None, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) hidden states -> (N,) values in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: torch.Tensor = self.head(hidden.float()).squeeze(-1)
        return values


def trunk_of(model: Any) -> Any:
    """The module below the head that turns token ids into hidden states; a peft wrapper is looked through."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(base, base.base_model_prefix, None)
    if trunk is None or trunk is base:
        raise UserError(f"{type(base).__name__} has no separate trunk; PPO needs a decoder with a head on top.")
    return trunk


def make_critic(
    kind: Literal["reward", "policy", "head"] | None,
    policy: Any,
    reward: Any,
    tuning: TuningBase,
    seed: int,
) -> Critic:
    """The critic of that kind, by default from ``reward`` if there is one; ``ValueError`` when it is missing."""
    if kind == "head":
        return critic_head(policy)
    if kind == "policy" or (kind is None and reward is None):
        return critic_from_policy(policy, tuning, seed)
    if reward is None:
        raise ValueError("critic is reward, but no reward_model is given; pass one, or take critic='policy'.")
    return critic_from_reward(reward, tuning, seed)


def critic_head(policy: Any) -> Critic:
    """A critic that is a head on the policy's hidden states (arXiv 1909.08593). It starts at zero, as all values."""
    return Critic(None, policy.config.get_text_config().hidden_size)


def critic_from_policy(policy: Any, tuning: TuningBase, seed: int) -> Critic:
    """A critic on the weights of ``policy``, a causal model without adapters yet. Its head is zero, as all values."""
    model = _copy(policy, tuning)
    return Critic(trunk_of(apply_tuning(model, tuning, seed)), policy.config.get_text_config().hidden_size)


def critic_from_reward(reward: Any, tuning: TuningBase, seed: int) -> Critic:
    """A critic on the weights of ``reward``, a sequence classifier with one label; its head is the score head.

    At the last token of a response its first value is thus the reward model's score (arXiv 2403.17031, detail 5).
    ``reward`` itself stays as it is and can go on scoring.
    """
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"critic: reward needs a reward model with one linear 'score' head; {type(reward).__name__} has "
            f"{type(head).__name__}. Set critic: policy."
        )
    critic = Critic(trunk_of(apply_tuning(_copy(reward, tuning), tuning, seed)), head.in_features)
    critic.head.weight.data.copy_(head.weight.detach())
    if head.bias is not None:
        critic.head.bias.data.copy_(head.bias.detach())
    return critic


def _copy(model: Any, tuning: TuningBase) -> Any:
    """A second module tree: over the same tensors when they stay frozen, over copies when they are trained."""
    if tuning.trains_all:
        duplicate = copy.deepcopy(model)
        duplicate.requires_grad_(True)
        return duplicate
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
