"""The critic: a separate model with one value per token that starts from the reward model or from the policy.

With adapters it shares the frozen tensors of the model it starts from, so it costs an adapter and a head. Or it is only
a head on the policy's trunk.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from align.config.tuning import LowRank, TuningBase
from align.errors import UserError
from align.models.checkpoints.conversion import plain_of
from align.models.tuning.apply import apply_tuning


class Critic(nn.Module):
    """A trunk and a linear head. The head always computes in float32: bf16 would round values to 8 bits.

    Without a trunk it reads the policy's hidden states. It then costs one vector and no forward pass.
    """

    def __init__(self, trunk: nn.Module | None, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return values (N,) in float32 of hidden states (N, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: torch.Tensor = self.head(hidden.float()).squeeze(-1)
        return values


def trunk_of(model: Any) -> Any:
    """Return the module below the head that turns token ids into hidden states, also of a model in a peft wrapper."""
    base = plain_of(model)
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
    """Return a critic, by default from ``reward`` if there is one. Raises ``ValueError`` if it needs a reward model."""
    if isinstance(tuning, LowRank):
        # Values need no new tokens, and the reward model's embedding has not learned them with the policy.
        tuning = tuning.model_copy(update={"train_tokens": []})
    if kind == "head":
        return critic_head(policy)
    if kind == "policy" or (kind is None and reward is None):
        return critic_from_policy(policy, tuning, seed)
    if reward is None:
        raise ValueError("critic is reward, but no reward_model is given; pass one, or take critic='policy'.")
    return critic_from_reward(reward, tuning, seed)


def critic_head(policy: Any) -> Critic:
    """Return a critic that is a head on the policy's hidden states (arXiv 1909.08593). All values start at 0."""
    return Critic(None, policy.config.get_text_config().hidden_size)


def critic_from_policy(policy: Any, tuning: TuningBase, seed: int) -> Critic:
    """Return a critic on the weights of ``policy``, a causal model without adapters yet. All values start at 0."""
    model = _copy(policy, tuning)
    return Critic(trunk_of(apply_tuning(model, tuning, seed)), policy.config.get_text_config().hidden_size)


def critic_from_reward(reward: Any, tuning: TuningBase, seed: int) -> Critic:
    """Return a critic on the weights of ``reward``, a sequence classifier with one label. Its head is the score head.

    So its value at the last token of a response is the reward model's score at first (arXiv 2403.17031, detail 5).
    ``reward`` itself is not changed and can still score.
    """
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"critic: reward needs a reward model with one linear 'score' head; {type(reward).__name__} has "
            f"{type(head).__name__}. Set critic: policy."
        )
    # Add adapters to a copy of the modules, because the reward model must keep scoring without them.
    critic = Critic(trunk_of(apply_tuning(_copy(reward, tuning), tuning, seed)), head.in_features)
    critic.head.weight.data.copy_(head.weight.detach())
    if head.bias is not None:
        critic.head.bias.data.copy_(head.bias.detach())
    return critic


def _copy(model: Any, tuning: TuningBase) -> Any:
    """Return a second module tree: over the same tensors if they stay frozen, over copies if they are trained."""
    if tuning.trains_all:
        duplicate = copy.deepcopy(model)
        duplicate.requires_grad_(True)
        return duplicate
    # deepcopy treats objects in its memo as already copied: every tensor stays, only the modules are new.
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
