"""What one device holds when several share a stage: from one process's memory to a device's. Never imports torch.

Counted by what the engines say they do, with float32 weights and autocast, as ``align.training`` sets them up: DDP has
buckets as large as the gradients; FSDP2 gathers a layer's weights while it computes it, and the next one's ahead, and
those around the layers for a whole step; DeepSpeed keeps a master copy beside AdamW's averages, a bucket of gradients,
and at stage 3 so many gathered weights as its defaults allow. Autocast's bfloat16 copies of gathered weights stay until
their backward pass. Reward models and the rollout engine are never shared out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align.capacity.job import Job
from align.capacity.memory import Memory
from align.capacity.strategies import Strategy
from align.models.activations import FLOAT
from align.models.architecture import Architecture

BUCKET = 2 * 2**20 * 25
"""Bytes of NCCL's and the engines' own exchange buffers: two buckets of 25 MiB."""
ZERO_BUCKET, ZERO_LIVE = 5 * 10**8, 10**9
"""Parameters of DeepSpeed's bucket, and of the weights that stage 3 may keep gathered, by its own defaults."""
GATHERED_AHEAD = 2
"""Layers whose whole weights are there at a time."""


def shared(memory: Memory, job: Job, strategy: Strategy, devices: int) -> Memory:
    """What a device holds of ``memory``, that of one process alone."""
    if strategy.name in ("single", "ddp"):
        extra = BUCKET + FLOAT * job.trained if devices > 1 else 0  # buckets beside the gradients themselves
        return replace(memory, buffers=extra)
    masters = memory.gradients if strategy.name == "deepspeed" else 0  # as many bytes: float32, of what is trained
    optimizer, critic = memory.optimizer + masters, memory.critic
    parts: dict[str, Any] = {
        "weights": _part(memory.weights, strategy.shares_weights, devices),
        "gradients": _part(memory.gradients, strategy.shares_gradients, devices),
        "optimizer": _part(optimizer, strategy.shares_optimizer, devices),
        "reference": _part(memory.reference, strategy.shares_weights, devices),
        # 16 bytes a parameter of the critic's own: 4 weights, 4 gradients, 8 of AdamW
        "critic": _part(critic // 4, strategy.shares_weights, devices)
        + _part(critic // 4, strategy.shares_gradients, devices)
        + _part(critic // 2, strategy.shares_optimizer, devices),
    }
    for name in _moved(strategy):
        parts[name] = 0
    copies = memory.copies
    if (
        strategy.name == "deepspeed"
        and strategy.checkpointing
        and job.precision == "bfloat16"
        and job.tuning.trains_all
    ):
        copies = max(copies, 2 * job.model.matrices)  # its own autocast keeps them all to the end of a pass
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
    """Bytes of weights and gradients that are whole for a while."""
    bucket = FLOAT * min(ZERO_BUCKET, job.trained)
    if strategy.name == "deepspeed":
        return bucket + (FLOAT * min(ZERO_LIVE, job.gathered) if strategy.shares_weights else 0)
    model = job.model
    layer = sum(linear.parameters for linear in model.linears) + model.vectors
    root = model.embedded + (0 if model.tied else model.head)
    gradients = largest_unit(model) if job.tuning.trains_all else 0
    return FLOAT * (GATHERED_AHEAD * layer + root + gradients)


def _moved(strategy: Strategy) -> tuple[str, ...]:
    return {"none": (), "optimizer": ("optimizer",), "all": ("weights", "gradients", "optimizer")}[strategy.offload]


def _part(amount: int, is_shared: bool, devices: int) -> int:
    return -(-amount // devices) if is_shared else amount
