"""The loss of a micro-batch: the forward passes of policy and critic, the objective, and the supervised texts."""

from __future__ import annotations

from typing import Any

import torch

from align.rl.buffer import MicroBatch
from align.rl.objectives.base import Step
from align.rl.packing import Batch
from align.rl.ptx import split_outputs
from align.rl.refusals import require_finite


def micro_batch_loss(trainer: Any, micro_batch: MicroBatch, step: Step) -> torch.Tensor:
    """Return a micro-batch's share of the optimizer step's loss, a scalar."""
    objective = trainer.objective
    outputs, critic_loss = _forward(trainer, micro_batch, step)
    outputs, ptx_loss, ptx_tokens = split_outputs(outputs, micro_batch.pack, micro_batch.width)
    loss = objective.loss(outputs, micro_batch.tensors, step)
    if ptx_loss is not None:
        # The term is multiplied by 0, not skipped: under DDP every parameter needs a gradient.
        ptx_coef = 0.0 if objective.rests_policy(step.update) else trainer.config.ptx_coef
        loss = loss + ptx_coef * ptx_loss / step.ptx_count
    if trainer.ptx is not None:
        # Add the loss even without texts: the sums are reduced by position, so all processes must add the same names.
        objective.averages.add("ptx_loss", 0.0 if ptx_loss is None else ptx_loss.detach(), ptx_tokens)
    require_finite(trainer, "loss", loss)
    total: torch.Tensor = loss * trainer.args.world_size + critic_loss  # DDP averages; ours are shares of one sum
    return total


def _forward(trainer: Any, micro_batch: MicroBatch, step: Step) -> tuple[Batch, torch.Tensor | float]:
    """Return the outputs to learn from, and the loss of a critic that has learned already, without a graph.

    The critic's backward pass may be over before the policy's forward pass, which halves activations. That is not
    possible if they share a trunk, or under DDP, which expects one backward pass for each forward pass.
    """
    model, world_size = trainer.model_wrapped, trainer.args.world_size
    if micro_batch.outputs is not None:
        return micro_batch.outputs, 0.0  # kept from measuring
    critic = getattr(trainer.model, "critic", None)
    if critic is None:
        return model(micro_batch.pack), 0.0
    policy_rests = trainer.objective.rests_policy(step.update)
    if world_size == 1 and critic.trunk is not None and not policy_rests:
        critic_loss = _learn_critic(trainer, micro_batch, step)
        return model(micro_batch.pack, critic=False), critic_loss
    # Under DDP every parameter must be part of the backward pass, so a resting policy also runs.
    return model(micro_batch.pack, policy=not policy_rests or world_size > 1), 0.0


def _learn_critic(trainer: Any, micro_batch: MicroBatch, step: Step) -> torch.Tensor:
    """Run the critic's forward and backward pass; return its part of the loss, without a graph."""
    outputs = trainer.model_wrapped(micro_batch.pack, policy=False)
    outputs, _, _ = split_outputs(outputs, micro_batch.pack, micro_batch.width)
    loss = trainer.objective.loss(outputs, micro_batch.tensors, step)
    require_finite(trainer, "loss", loss)
    with torch.autocast(loss.device.type, enabled=False):  # as for the policy's backward pass
        trainer.accelerator.backward(loss)
    detached: torch.Tensor = loss.detach()
    return detached
