"""Own losses and advantages of grpo and ppo: equal to the shipped methods when they compute the same."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.validation import validate
from align.errors import UserError
from align.methods.call import FunctionFailed
from align.rl.objectives import Objective, Step
from align.rl.objectives.grpo import GRPOObjective
from align.rl.objectives.ppo import PPOObjective
from align.rl.rewards import KLPenalty
from align.rl.rollout import Rollout

MODULE = """
import torch

def clip(tokens, low=0.2, high=0.2):
    ratio = tokens.ratio
    clipped = ratio.clamp(1 - low, 1 + high)
    losses = torch.maximum(-tokens.advantages * ratio, -tokens.advantages * clipped)
    return losses, {"own_ratio": ratio.detach().max(), "token_ratio": ratio, "length": tokens.mask.sum(dim=1)}

def of_responses(tokens):
    lengths = tokens.mask.sum(dim=1)
    gap = ((tokens.new_logprobs - tokens.logprobs) * tokens.mask).sum(dim=1) / lengths
    return -tokens.advantages[:, 0] * torch.exp(gap)

def leave_one_out(group):
    n = len(group)
    return group.scores - (group.scores.sum() - group.scores) / max(n - 1, 1)

def by_token(group):
    return group.scores[:, None] * torch.arange(1, group.mask.shape[1] + 1)

def too_few(group):
    return group.scores[:1] if len(group) > 1 else group.scores

def compares_groups(tokens):
    return -(tokens.advantages - tokens.advantages.mean()) * tokens.ratio
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rl.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rl", raising=False)


RL = {"policy": "sft", "prompts": "data", "score": "gold", "rollout_batch": 4, "num_mini_batches": 1}


def grpo(**fields: Any) -> GrpoConfig:
    return validate(GrpoConfig, RL | {"samples_per_prompt": 2, "kl_coef": 0.0} | fields, "grpo")


def rollout() -> Rollout:
    """Four responses of one to three tokens to two prompts."""
    lengths = [3, 1, 2, 3]
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(4, 3, generator=generator) * mask
    return Rollout(
        update=0,
        rows=[{"id": str(number // 2)} for number in range(4)],
        groups=[5, 5, 9, 9],
        prompts=[[1]] * 4,
        responses=[[2] * length for length in lengths],
        texts=["a"] * 4,
        tensors={
            "scores": torch.tensor([1.0, 0.0, 0.5, 2.0]),
            "score_style": torch.tensor([0.1, 0.2, 0.3, 0.4]),
            "finished": torch.tensor([True, True, False, True]),
            "response_mask": mask,
            "logprobs": logprobs,
            "sampler_logprobs": logprobs,
            "ref_logprobs": logprobs - 0.1 * mask,
            "values": torch.randn(4, 4, generator=generator),
        },
    )


def learn(objective: Objective) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return loss, gradient of the new log-probabilities, and advantages of one step."""
    data = rollout()
    objective.advantages(data, KLPenalty(0.0, 0.0))
    batch = data.select([0, 1, 2, 3], objective.loss_inputs)
    drift = torch.linspace(-0.5, 0.5, 12).view(4, 3)
    new = (batch["logprobs"] + drift).requires_grad_()
    outputs = {"logprobs": new, "entropy": torch.zeros(4, 3)}
    loss = objective.loss(outputs, batch, Step(0, objective.token_count([batch]), KLPenalty(0.0, 0.0)))
    loss.backward()
    assert new.grad is not None
    return float(loss.detach()), new.grad, data.tensors["advantages"]


def test_own_loss_equals_the_shipped_surrogate() -> None:
    # ``bnpo`` is the clipped surrogate in which every token weighs the same.
    shipped = learn(GRPOObjective(grpo(loss="bnpo")))
    objective = GRPOObjective(grpo(loss={"function": "own_rl:clip", "low": 0.2}))
    own = learn(objective)
    assert own[0] == pytest.approx(shipped[0], rel=1e-6)
    assert torch.allclose(own[1], shipped[1])
    means = objective.averages.means(lambda totals: totals)
    assert means["own_ratio"] == pytest.approx(math.exp(0.5))
    # A metric of tokens is a mean over the learned tokens, a metric of responses over the responses.
    assert means["token_ratio"] == pytest.approx(means["ratio"]) and means["length"] == 9 / 4


def test_loss_of_responses_weighs_responses_alike() -> None:
    # GSPO without clipping: the clip range is as wide as it may be.
    shipped = learn(GRPOObjective(grpo(loss="gspo", clip_range=0.99, clip_range_high=9.0)))
    own = learn(GRPOObjective(grpo(loss="own_rl:of_responses")))
    assert own[0] == pytest.approx(shipped[0], rel=1e-6)
    assert torch.allclose(own[1], shipped[1])


def test_ppo_adds_an_own_loss_to_its_critics() -> None:
    config = RL | {"reward_floor": None, "critic": "policy", "clip_range": 0.2}
    shipped = learn(PPOObjective(validate(PpoConfig, config, "ppo")))
    own = learn(PPOObjective(validate(PpoConfig, config | {"loss": "own_rl:clip"}, "ppo")))
    assert own[0] == pytest.approx(shipped[0], rel=1e-6)
    assert torch.allclose(own[1], shipped[1])


def test_own_advantage_gets_a_group() -> None:
    _, _, advantages = learn(GRPOObjective(grpo(advantage="own_rl:leave_one_out")))
    expected = torch.tensor([1.0, -1.0, -1.5, 1.5])[:, None] * rollout().tensors["response_mask"]
    assert torch.equal(advantages, expected)


def test_own_advantage_may_differ_by_token() -> None:
    _, _, advantages = learn(GRPOObjective(grpo(advantage="own_rl:by_token")))
    assert advantages.tolist() == [[1, 2, 3], [0, 0, 0], [0.5, 1, 0], [2, 4, 6]]


def test_wrong_length_of_an_advantage_names_the_prompt() -> None:
    with pytest.raises(
        FunctionFailed, match=r"own_rl:too_few: .* of shape \(1,\); return \(2,\) or \(2, 3\).*, in update 1, rows 0"
    ):
        learn(GRPOObjective(grpo(advantage="own_rl:too_few")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "own_rl:compares_groups"}, "fails the check 'micro-batch'"),
        ({"loss": "own_rl:leave_one_out"}, "AttributeError"),
    ],
)
def test_broken_loss_is_refused_before_sampling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GRPOObjective(grpo(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "own_rl:clip", "clip_range": 0.1}, "clip_range is of the shipped losses"),
        ({"advantage": "own_rl:leave_one_out", "scale_rewards": "none"}, "scale_rewards is of the shipped advantages"),
    ],
)
def test_fields_of_shipped_methods_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grpo(**fields)


def test_sources_of_own_functions_are_part_of_the_key(tmp_path: Path) -> None:
    config = grpo(loss={"function": "own_rl:clip", "low": 0.1}, advantage="own_rl:leave_one_out")
    assert {"loss", "advantage"} <= config.identities(tmp_path).keys()
    with pytest.raises(UserError, match="clip has no argument 'lwo'. Did you mean 'low'?"):
        grpo(loss={"function": "own_rl:clip", "lwo": 0.1}).identities(tmp_path)
