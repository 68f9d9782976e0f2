"""Passes over a rollout that measure log-probabilities, entropies and values."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate.utils import send_to_device

from align.models.checkpoints.sharding import is_sharded, reshard
from align.models.compute.precision import frozen_in_bf16
from align.models.compute.processes import all_reduce, split_by_rank
from align.rl.packing import Batch
from align.rl.rollout import Rollout

Indices = list[list[int]]
"""Responses of each micro-batch."""


def measure_passes(
    trainer: Any, rollout: Rollout, micro_batches: Indices, reused: Indices | None = None
) -> list[Batch]:
    """Store the outputs of a pass over each micro-batch; return the outputs of ``reused``, with their graphs.

    Every process measures some of the micro-batches, and gets all results.
    """
    trainer.model.eval()
    kept_outputs = []
    names: set[str] = set()
    # A sharded model would be held gathered by an autocast around several passes, so it has one around each.
    shards = is_sharded(trainer.model)
    rounds = trainer.args.bf16 and not shards
    # Each loop rounds the weights to autocast's type once, for itself: copies made without gradients have no graph to
    # the weights.
    with frozen_in_bf16(trainer.model) if rounds else contextlib.nullcontext():
        for part, with_graph in ((micro_batches, False), (reused or [], True)):
            autocast = contextlib.nullcontext() if shards else trainer.accelerator.autocast()
            with torch.set_grad_enabled(with_graph), autocast:
                for _, indices, counts in split_by_rank(part):
                    batch = send_to_device(trainer.buffer.pack(rollout, indices), trainer.args.device)
                    outputs = trainer.model_wrapped(batch, reference=True)
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
    for name in sorted(names):  # zeros if another process measured
        rollout.tensors[name] = all_reduce(rollout.tensors[name])
    return kept_outputs
