"""Outputs of a policy with a critic: only what was asked for, with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.models.fast.token_logprobs import PLAIN, logit_transform
from align.models.loading import load_policy
from align.rl.model import PolicyAndCritic, PolicyAndReference, critic_head
from align.rl.packing import pack
from tests.support.models.families import family_model


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


@pytest.mark.parametrize("model_type", ["granite", "cohere2", "gemma2"])
def test_transformed_logits_equal_those_of_the_family(model_type: str) -> None:
    """Log-probabilities and their gradients, at temperature 0.7, against the family's own forward pass."""
    policy = family_model(model_type).eval()
    policy.get_output_embeddings().weight.data.mul_(20.0)  # so scales and caps change the distribution
    assert logit_transform(policy) != PLAIN
    prompt, response = [5, 6, 7], [10, 2, 30]
    model = PolicyAndReference(policy, temperature=0.7)
    outputs = model(pack([prompt], [response], [0], pad_id=3, form="padded"), reference=True)
    outputs["logprobs"].sum().backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]

    policy.zero_grad()
    logits = policy(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, 2:-1] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    expected.sum().backward()
    torch.testing.assert_close(outputs["logprobs"][0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["ref_logprobs"][0], expected, atol=1e-5, rtol=0)
    plain_gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-5, rtol=1e-5)
