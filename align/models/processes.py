"""The processes that train one model together: how they join, agree, and share out what each can do alone.

Everything here is the identity where there is one process. What fails in one of them ends it, and the launcher then
ends the others; so nothing here catches errors. Left out: the model itself (``align.training.sharding``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from align.config.launch import local_rank, rank, world_size
from align.config.runtime import Runtime
from align.models.threads import device_of, use_threads

T = TypeVar("T")


def join(runtime: Runtime) -> None:
    """Meet the stage's other processes: gloo on CPUs, NCCL between GPUs, one of which each process has.

    Before anything of transformers or accelerate, which take the group as they find it.
    """
    if world_size() == 1:
        return
    use_threads(runtime)
    backend = "gloo"
    if device_of(runtime).type == "cuda":
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=runtime.launch.timeout))


def leave() -> None:
    """Take leave of the others, so that the interpreter does not end under the backend's running threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agreed(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them."""
    if world_size() == 1:
        return make()
    found: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result


def wait_for_all() -> None:
    """Go on once every process is here."""
    if world_size() > 1:
        dist.barrier()


def gathered(own: T) -> list[T]:
    """What each process has, the first one's first, in all of them."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` added up over all processes."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def part_of(count: int) -> range:
    """This process's part of ``count`` things in a row; parts differ by one at most, and may be empty."""
    here, all_of_them = rank(), world_size()
    return range(count * here // all_of_them, count * (here + 1) // all_of_them)


def turns(items: Sequence[T]) -> list[tuple[int, T, bool]]:
    """This process's items, dealt out by turns, as (number, item, whether it counts); as many in every process.

    Where they do not come out even a process does the first item once more, which does not count: passes of a sharded
    model are made by all processes together or by none.
    """
    mine = [(at, item, True) for at, item in enumerate(items)][rank() :: world_size()]
    if items and len(mine) < -(-len(items) // world_size()):
        mine.append((0, items[0], False))
    return mine
