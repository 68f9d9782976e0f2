"""Memory of one device when several share a stage: from one process's memory to a device's. Never imports torch.

Counted from what the frameworks document, with float32 weights and autocast, as ``align.training`` sets them up:

- DDP has buckets as large as the gradients.
- FSDP2 gathers a layer's weights while it computes the layer, and the next layer's ahead. Weights outside the layers
  stay gathered for a step.
- DeepSpeed keeps a master copy of the weights beside AdamW's averages and a bucket of gradients. At stage 3 it keeps as
  many gathered weights as its defaults allow.

Autocast's bfloat16 copies of gathered weights stay until their backward pass. Reward models and the rollout engine are
never sharded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align.capacity.job import Job
from align.capacity.layouts import Strategy
from align.capacity.memory import Memory
from align.models.activations import FLOAT
from align.models.architecture import Architecture

BUCKET = 2 * 2**20 * 25
"""Bytes of exchange buffers of NCCL and the frameworks: two buckets of 25 MiB."""
ZERO_BUCKET, ZERO_LIVE = 5 * 10**8, 10**9
"""Parameters of DeepSpeed's bucket, and of the weights that stage 3 may keep gathered, by its own defaults."""
GATHERED_AHEAD = 2
"""Layers whose full weights are in memory at a time."""
OFFLOADED: dict[str, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("optimizer",),
    "all": ("weights", "gradients", "optimizer"),
}
"""Parts of ``Memory`` that each ``Strategy.offload`` moves to the machine's own memory."""


def sharded(memory: Memory, job: Job, strategy: Strategy, devices: int) -> Memory:
    """Return what one of ``devices`` devices holds of ``memory``, that of one process alone."""
    if strategy.name in ("single", "ddp"):
        # Every device holds everything; DDP adds its buckets only.
        buckets = BUCKET + FLOAT * job.trained if devices > 1 else 0  # beside the gradients themselves
        return replace(memory, buffers=buckets)
    is_deepspeed = strategy.name == "deepspeed"
    # the master copy has as many bytes as the gradients: float32, of what is trained
    optimizer = memory.optimizer + (memory.gradients if is_deepspeed else 0)
    # 16 bytes per trained parameter of the critic: 4 of weights, 4 of gradients, 8 of AdamW
    critic_weights, critic_optimizer = memory.critic // 4, memory.critic // 2
    parts: dict[str, Any] = {
        "weights": _shard(memory.weights, strategy.shards_weights, devices),
        "gradients": _shard(memory.gradients, strategy.shards_gradients, devices),
        "optimizer": _shard(optimizer, strategy.shards_optimizer, devices),
        "reference": _shard(memory.reference, strategy.shards_weights, devices),
        "critic": _shard(critic_weights, strategy.shards_weights, devices)
        + _shard(critic_weights, strategy.shards_gradients, devices)
        + _shard(critic_optimizer, strategy.shards_optimizer, devices),
    }
    for name in OFFLOADED[strategy.offload]:
        parts[name] = 0
    copies = memory.copies
    low_precision = job.precision == "bfloat16" and job.tuning.trains_all
    if is_deepspeed and strategy.checkpointing and low_precision:
        # DeepSpeed's own autocast keeps a copy of every matrix to the end of a pass
        copies = max(copies, 2 * job.model.matrices)
    exchange = BUCKET if devices > 1 else 0
    return replace(memory, **parts, copies=copies, buffers=exchange + _gathered_bytes(job, strategy))


def offloaded(memory: Memory, job: Job, strategy: Strategy, devices: int) -> int:
    """Return the bytes that one device's shard takes of the machine's own memory."""
    on_device = sharded(memory, job, replace(strategy, offload="none"), devices)
    return sum(int(getattr(on_device, name)) for name in OFFLOADED[strategy.offload])


def largest_unit(model: Architecture) -> int:
    """Return the parameters that sharding gathers at once: a layer, or the embeddings."""
    return max(_layer_parameters(model), model.embedded)


def _layer_parameters(model: Architecture) -> int:
    return sum(linear.parameters for linear in model.linears) + model.vectors


def _gathered_bytes(job: Job, strategy: Strategy) -> int:
    """Return the bytes of weights and gradients that are unsharded for a while."""
    if strategy.name == "deepspeed":
        bucket = FLOAT * min(ZERO_BUCKET, job.trained)
        live = FLOAT * min(ZERO_LIVE, job.gathered) if strategy.shards_weights else 0
        return bucket + live
    model = job.model
    # Gathered at once: some layers, what lies outside the layers, and the gradient of the largest unit.
    root = model.embedded + (0 if model.tied else model.head)
    gradients = largest_unit(model) if job.tuning.trains_all else 0
    return FLOAT * (GATHERED_AHEAD * _layer_parameters(model) + root + gradients)


def _shard(amount: int, is_sharded: bool, devices: int) -> int:
    return -(-amount // devices) if is_sharded else amount
