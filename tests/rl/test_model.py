"""Outputs of a policy with a critic: only what was asked for, with the same numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from align.models.loading import load_policy
from align.rl.model import PolicyAndCritic, critic_head
from align.rl.packing import pack


def test_values_of_a_head_come_without_logprobs(tiny_model: Path) -> None:
    """In the critic's warm-up, log-probabilities would count towards the policy's metrics."""
    policy = load_policy(tiny_model)
    model = PolicyAndCritic(policy, critic_head(policy), temperature=1.0)
    torch.nn.init.normal_(model.critic.head.weight)

    def outputs(**parts: bool) -> dict[str, torch.Tensor]:
        return model(pack([[5, 6]], [[10, 2]], [0], pad_id=3, form="padded"), **parts)

    everything = outputs()
    assert set(everything) == {"logprobs", "entropy", "values"}
    only_values = outputs(policy=False)
    assert set(only_values) == {"values"}
    assert torch.equal(only_values["values"], everything["values"])
    assert set(outputs(critic=False)) == {"logprobs", "entropy"}
