"""The passes of an update: measuring a rollout, the loss of a micro-batch, and the optimizer of policy and critic.

The loss of a micro-batch is the objective's, after the forward passes of policy and critic, plus the supervised texts'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device

from align.config.tuning_blocks import LORA_HEAD_RATE
from align.models.checkpoints.sharding import is_sharded, reshard
from align.models.compute.processes import all_reduce, split_by_rank
from align.rl.buffer import MicroBatch
from align.rl.model import PolicyAndReference
from align.rl.objectives import Step
from align.rl.packing import Batch
from align.rl.prompts import split_outputs
from align.rl.refusals import require_finite
from align.rl.rollout import Rollout


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
    model = trainer.memory.model(trainer)
    world_size = trainer.args.world_size
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
    outputs = trainer.memory.model(trainer)(micro_batch.pack, policy=False)
    outputs, _, _ = split_outputs(outputs, micro_batch.pack, micro_batch.width)
    loss = trainer.objective.loss(outputs, micro_batch.tensors, step)
    require_finite(trainer, "loss", loss)
    with torch.autocast(loss.device.type, enabled=False):  # as for the policy's backward pass
        trainer.accelerator.backward(loss)
    detached: torch.Tensor = loss.detach()
    return detached


Indices = list[list[int]]
"""Responses of each micro-batch."""


def measure_passes(trainer: Any, rollout: Rollout, cut: Callable[[], tuple[Indices, Indices]]) -> list[Batch]:
    """Store the outputs of a pass over each micro-batch; return the outputs of reused passes, with their graphs.

    ``cut`` returns the micro-batches of the present size without and with reuse. Every process measures some of them,
    and gets all results.
    """
    trainer.model.eval()
    stored = set(rollout.tensors)

    def undo() -> None:
        for name in rollout.tensors.keys() - stored:
            del rollout.tensors[name]

    kept_outputs: list[Batch]
    kept_outputs, names = trainer.memory.run(trainer, lambda: _measure(trainer, rollout, *cut()), undo)
    for name in sorted(names):  # zeros if another process measured
        rollout.tensors[name] = all_reduce(rollout.tensors[name])
    return kept_outputs


def _measure(trainer: Any, rollout: Rollout, micro_batches: Indices, reused: Indices) -> tuple[list[Batch], set[str]]:
    """Run this process's measuring passes; return the outputs of ``reused``, and the names of all outputs."""
    model = trainer.memory.model(trainer)
    kept_outputs = []
    names: set[str] = set()
    # A sharded model would be held gathered by an autocast around several passes, so it has one around each.
    shards = is_sharded(trainer.model)
    # A loop for passes without a graph: autocast's copies from these have no graph to the weights.
    for part, with_graph in ((micro_batches, False), (reused, True)):
        autocast = contextlib.nullcontext() if shards else trainer.accelerator.autocast()
        with torch.set_grad_enabled(with_graph), autocast:
            for _, indices, counts in split_by_rank(part):
                batch = send_to_device(trainer.buffer.pack(rollout, indices), trainer.args.device)
                outputs = model(batch, reference=True)
                names |= outputs.keys()
                # A pass that does not count only keeps the processes in step.
                rows = indices if counts else []
                rollout.store(rows, {name: output.detach()[: len(rows)] for name, output in outputs.items()})
                if with_graph:
                    # The reference has no graph, and the loss reads its values from the rollout.
                    outputs.pop("ref_logprobs")
                    kept_outputs.append(outputs)
    # No backward pass follows these passes, so free the weights that FSDP2 keeps gathered for one.
    if not reused:
        reshard(trainer.model)
    return kept_outputs, names


def make_optimizer(trainer: Any, model: Any) -> torch.optim.Optimizer:
    """Return the Trainer's optimizer with up to six groups: policy, critic and value head, with and without decay."""
    args = trainer.args
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    decaying = set(trainer.get_decay_parameter_names(model))
    groups = []
    for part, rate in learning_rates(args.config, model).items():
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        parameters_of_part = [(name, parameter) for name, parameter in trained if _part(name) == part]
        for decays in (True, False):
            parameters = [parameter for name, parameter in parameters_of_part if (name in decaying) == decays]
            if not parameters:
                continue
            decay = args.weight_decay if decays else 0.0  # biases and norms do not decay
            group = {"params": parameters, "lr": rate, "weight_decay": decay}
            # Only optimizers like Adam have a single epsilon.
            if part != "policy" and isinstance(options.get("eps"), float):
                group["eps"] = args.critic_adam_epsilon
            groups.append(group)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def learning_rates(config: Any, model: PolicyAndReference) -> dict[str, float]:
    """Return the peak rates of ``policy`` and, with a critic, ``critic`` (its trunk) and ``head``."""
    if not hasattr(model, "critic"):
        return {"policy": config.peak_rate}
    critic = config.critic_rate(sum(parameter.numel() for parameter in model.policy.parameters()))
    head = config.critic_head_learning_rate
    if head is None:
        # A policy with adapters is its own reference. Frozen weights are no sign of adapters, because full tuning may
        # also freeze.
        has_adapters = model.reference is None
        head = critic * (LORA_HEAD_RATE if has_adapters else 1.0)
    return {"policy": config.peak_rate, "critic": critic, "head": head}


def _part(name: str) -> str:
    return "head" if name.startswith("critic.head.") else name.split(".")[0]
