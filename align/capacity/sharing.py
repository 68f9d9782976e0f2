"""What one device holds when several share a stage: from one process's memory to a device's. Never imports torch.

Counted by what the engines say they do: DDP keeps buckets as large as the gradients; FSDP2 and ZeRO-3 gather a layer's
weights while they compute it, and the next one's ahead; DeepSpeed keeps bfloat16 weights and gradients and a float32
master copy beside AdamW's averages. Reward models and the rollout engine are never shared out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align.capacity.strategies import Strategy
from align.models.activations import FLOAT, SIZES
from align.models.architecture import Architecture
from align.models.job import Job
from align.models.memory import Memory

BUCKET = 2 * 2**20 * 25
"""Bytes of NCCL's and the engines' own exchange buffers: two buckets of 25 MiB."""
GATHERED_AHEAD = 2
"""Layers whose whole weights are there at a time."""


def shared(memory: Memory, job: Job, strategy: Strategy, devices: int) -> Memory:
    """What a device holds of ``memory``, that of one process alone."""
    if strategy.name in ("single", "ddp"):
        extra = BUCKET + FLOAT * job.trained if devices > 1 else 0  # buckets beside the gradients themselves
        return replace(memory, buffers=extra)
    low = strategy.name == "deepspeed" and job.precision == "bfloat16"
    trained, frozen = _split(memory, job)
    weights, optimizer = memory.weights, memory.optimizer
    gradients, critic = memory.gradients, memory.critic
    if low:  # bfloat16 weights and gradients; their float32 masters stand with AdamW's averages
        weights, gradients = trained // 2 + frozen // 2, gradients // 2
        optimizer += trained
    parts: dict[str, Any] = {
        "weights": _part(weights, strategy.shares_weights, devices),
        "gradients": _part(gradients, strategy.shares_gradients, devices),
        "optimizer": _part(optimizer, strategy.shares_optimizer, devices),
        "reference": _part(memory.reference, strategy.shares_weights, devices),
        # 16 bytes a parameter of the critic's own: 4 weights, 4 gradients, 8 of AdamW
        "critic": _part(critic // 4, strategy.shares_weights, devices)
        + _part(critic // 4, strategy.shares_gradients, devices)
        + _part(critic // 2, strategy.shares_optimizer, devices),
    }
    for name in _moved(strategy):
        parts[name] = 0
    copies = 0 if low or strategy.shares_weights else memory.copies
    return replace(memory, **parts, copies=copies, buffers=BUCKET * (devices > 1) + _gathered(job, strategy))


def offloaded(memory: Memory, job: Job, strategy: Strategy, devices: int) -> int:
    """Bytes that a device's share takes of the machine's own memory."""
    kept = shared(memory, job, replace(strategy, offload="none"), devices)
    return sum(int(getattr(kept, name)) for name in _moved(strategy))


def largest_unit(model: Architecture) -> int:
    """Parameters that sharding gathers at once: a layer, or the embeddings with what stands beside the layers."""
    layer = sum(linear.parameters for linear in model.linears) + model.vectors
    return max(layer, model.embedded)


def _gathered(job: Job, strategy: Strategy) -> int:
    """Whole weights of a few layers and of the embeddings, and a layer's whole gradients before they are shared out."""
    if not strategy.shares_weights:
        return 0
    size, model = SIZES[job.precision], job.model
    layer = sum(linear.parameters for linear in model.linears) + model.vectors
    root = model.embedded + (0 if model.tied else model.head)  # stays gathered from the first layer to the last
    gradients = largest_unit(model) if job.tuning.trains_all else 0
    return size * (GATHERED_AHEAD * layer + root) + FLOAT * gradients


def _moved(strategy: Strategy) -> tuple[str, ...]:
    return {"none": (), "optimizer": ("optimizer",), "all": ("weights", "gradients", "optimizer")}[strategy.offload]


def _split(memory: Memory, job: Job) -> tuple[int, int]:
    """Bytes of the weights that are trained, and of those that are not."""
    trained = min(memory.gradients, memory.weights)
    return trained, memory.weights - trained


def _part(amount: int, is_shared: bool, devices: int) -> int:
    return -(-amount // devices) if is_shared else amount
