"""Processes that train one model together: collective operations, shares of work, and deterministic kernels.

With one process everything here is the identity. A failure ends its process, and the launcher then ends the others, so
nothing here catches errors. Excluded: the model itself (``align.models.checkpoints.sharding``).

torch then uses the deterministic kernel, and raises ``RuntimeError`` at an operation that has none.
Excluded: equal bits on another card, with another torch, or in another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from align.config.runtime import Runtime
from align.config.runtime.launch import local_rank, rank, world_size
from align.models.compute.threads import device_of, use_threads

T = TypeVar("T")


def join(runtime: Runtime) -> None:
    """Join the stage's process group: gloo on CPUs, NCCL between GPUs, of which each process has one.

    Call it before transformers or accelerate start, which use the group as it is.
    """
    if world_size() == 1:
        return
    use_threads(runtime)
    backend = "gloo"
    if device_of(runtime).type == "cuda":
        torch.cuda.set_device(local_rank())
        # Objects and CPU tensors go over gloo, tensors on GPUs over NCCL.
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=runtime.launch.timeout))


def leave() -> None:
    """Destroy the process group, so the interpreter does not exit while the backend's threads run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(make: Callable[[], T]) -> T:
    """Call ``make`` in the first process and return its result in all of them."""
    if world_size() == 1:
        return make()
    # broadcast_object_list writes the first process's objects into every process's list.
    box: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


def wait_for_all() -> None:
    """Return once every process has called this."""
    if world_size() > 1:
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Return every process's value, ordered by rank, in all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``tensor``, of any shape, over all processes."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def rank_range(count: int) -> range:
    """Return this process's part of ``range(count)``; parts differ by one item at most and may be empty."""
    index, processes = rank(), world_size()
    return range(count * index // processes, count * (index + 1) // processes)


def split_by_rank(items: Sequence[T]) -> list[tuple[int, T, bool]]:
    """Return every ``world_size``-th item for this process, as (index, item, counts); as many in every process.

    A process that would have one item less gets the first item again with ``counts`` False: all processes must run the
    forward passes of a sharded model together.
    """
    share = [(number, item, True) for number, item in enumerate(items)][rank() :: world_size()]
    longest_share = -(-len(items) // world_size())
    # A repeat of the first item keeps the number of collective calls equal.
    if items and len(share) < longest_share:
        share.append((0, items[0], False))
    return share


SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""Variables that cuBLAS reads when it is first used, and transformers at each call of flash-attn's kernels."""


def use_deterministic_kernels() -> None:
    """Restrict this process to deterministic kernels; call it before the first product on a GPU."""
    os.environ.update(SETTINGS)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def cumulative_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the cumulative sums of floats, of the same shape; on the CPU where only deterministic kernels are allowed.

    A GPU adds up the parts of a scan in the order in which they finish, so torch refuses its kernel then.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim).to(values.device)
    return values.cumsum(dim)
