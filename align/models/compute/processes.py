"""Processes that train one model together, and the threads, device, memory and kernels of each.

With one process the collective operations are the identity. A failure ends its process, and the launcher then ends the
others, so no function here catches errors. Excluded: the model itself (``align.models.checkpoints.sharding``).

Threads and memory change speed, and results only by rounding. glibc keeps the small blocks that a backward pass frees
in its heap, as much as all activations together. Large blocks, such as logits, are then allocated on top of it.
Trimming pays off between passes of different kinds. glibc gives large blocks back at once, and the system clears them
page by page when they are allocated again. Keeping them pays off if passes of one kind follow each other. On other C
libraries there is no effect.

With deterministic kernels torch raises ``RuntimeError`` at an operation that has none. Excluded: equal bits on another
card, with another torch, or in another number of processes.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from align.config.runtime import Runtime
from align.config.runtime.launch import local_rank, local_size, rank, world_size
from align.errors import UserError
from align.pipeline.process_limits import usable_cores, usable_memory

T = TypeVar("T")
MADV_PAGEOUT = 21
"""Advice to ``madvise`` to reclaim pages now, whose content is kept; Python's ``mmap`` has no name for it."""


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


def use_threads(runtime: Runtime) -> int:
    """Set torch's thread count to ``runtime.threads``, or to this process's share of the cores, and return it.

    ``accelerate launch`` sets ``OMP_NUM_THREADS=1`` on a CPU, which would leave all other cores idle.
    """
    threads = runtime.threads or max(1, usable_cores() // local_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def device_of(runtime: Runtime) -> Any:
    """Return the ``torch.device`` to work on. Raises ``UserError`` when CUDA is required and not available."""
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            f"runtime.device is cuda, but torch {torch.__version__} sees no CUDA device; set it to auto or cpu."
        )
    return torch.device("cuda" if runtime.device != "cpu" and available else "cpu")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Options of ``mallopt`` (``malloc.h``)."""
DEFAULT_MMAP_MAX = 65536
"""Blocks that glibc requests from the system one by one, unless it is told otherwise."""
LARGEST_KEPT = 32 * 2**20
"""The most that older glibc allows, and that any raises it to by itself."""
KEPT = 2 * LARGEST_KEPT


def trim_malloc(garbage: bool = True) -> None:
    """Let glibc return the freed memory that it holds; needs some hundredths of a second per GiB.

    With ``garbage`` objects that refer to one another, as models do, are freed first. Finding them needs some tenths of
    a second, so frequent callers leave it out.
    """
    if garbage:
        gc.collect()
    trim = _glibc_function("malloc_trim")
    if trim is not None:
        trim(0)


def page_out(tensor: torch.Tensor) -> None:
    """Take the pages of a tensor in a mapped file out of memory; the next access reads them again."""
    advise = _glibc_function("madvise")
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    if advise is not None and tensor.device.type == "cpu" and size >= mmap.PAGESIZE:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size // mmap.PAGESIZE * mmap.PAGESIZE), MADV_PAGEOUT)


def empty_caches() -> None:
    """Return freed memory to the system, and on a GPU to other programs."""
    trim_malloc()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # torch keeps freed memory of a GPU for itself


def free_memory() -> int:
    """Return the bytes that another model may have: on the GPU if there is one, else in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    own_bytes = int(psutil.Process().memory_info().rss)
    return min(int(psutil.virtual_memory().available), max(0, usable_memory() - own_bytes))


class RestingWeights:
    """Frozen weights that are in the machine's memory while other work needs the device's.

    Their copy there is made once, because they never change. Parameters stay the same objects, and tensors that several
    of them share stay shared.
    """

    def __init__(self, model: nn.Module) -> None:
        # Vectors are small, and adapters are merged with them on the device.
        self._frozen = [weight for weight in model.parameters() if weight.dim() > 1 and not weight.requires_grad]
        self._on_host: list[torch.Tensor] = []
        """The copy of each parameter, once there is one."""
        self._device: torch.device | None = None
        """Device that the weights come back to; None while they are on it."""

    @property
    def is_away(self) -> bool:
        """True while the weights are in the machine's memory."""
        return self._device is not None

    def leave(self) -> None:
        """Free the device's memory, also what torch keeps of it; the weights must be back before they are used."""
        if self._device is None and self._frozen:
            self._leave()
        empty_caches()

    # An engine and an evaluation call both methods where tensors are made that no later pass could save.
    @torch.inference_mode(False)
    def _leave(self) -> None:
        self._device = self._frozen[0].device
        self._on_host = self._on_host or self._move(self._frozen, self._to_host)
        for parameter, tensor in zip(self._frozen, self._on_host, strict=True):
            parameter.data = tensor

    @torch.inference_mode(False)
    def come_back(self) -> None:
        """Bring the weights back to the device, if they are away."""
        if self._device is None:
            return
        device, self._device = self._device, None
        for parameter, tensor in zip(
            self._frozen, self._move(self._on_host, lambda host: host.to(device, copy=True)), strict=True
        ):
            parameter.data = tensor

    @staticmethod
    def _to_host(tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.to("cpu", copy=True)
        return host.pin_memory() if tensor.device.type == "cuda" else host

    @staticmethod
    def _move(tensors: Sequence[torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
        for tensor in tensors:
            place = (tensor.data_ptr(), tensor.shape)
            if place not in moved:
                moved[place] = move(tensor.detach())
        return [moved[tensor.data_ptr(), tensor.shape] for tensor in tensors]


def memory_of_gpu(runtime: Runtime) -> tuple[int, int] | None:
    """Return the free and the total bytes of the GPU that a process works on; None on a CPU."""
    device = device_of(runtime)
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def keep_freed_memory() -> None:
    """Let glibc keep up to ``KEPT`` bytes of freed memory from now on, in blocks up to ``LARGEST_KEPT`` bytes.

    By itself it keeps twice the largest block that it has given back so far: less than an MLP holds between its
    products. A process cannot undo this.
    """
    set_option = _glibc_function("mallopt")
    if set_option is not None:
        set_option(M_TRIM_THRESHOLD, KEPT)
        set_option(M_MMAP_THRESHOLD, LARGEST_KEPT)


@contextmanager
def untrimmed_heap() -> Iterator[None]:
    """Inside, glibc keeps whatever is freed, and allocates blocks of every size from its heap.

    For a loop that asks for the same blocks in each step: with full tuning the blocks of the gradients are as large as
    the weights. Behind it the memory is given back, and glibc works as after ``keep_freed_memory``.
    """
    set_option = _glibc_function("mallopt")
    if set_option is None:
        yield
        return
    set_option(M_MMAP_MAX, 0)
    set_option(M_TRIM_THRESHOLD, -1)  # no limit: the largest number of a size_t
    try:
        yield
    finally:
        set_option(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        keep_freed_memory()
        trim_malloc(garbage=False)


def _glibc_function(name: str) -> Any:
    """Return a function of glibc; None on other systems, and if the C library lacks it."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)  # musl has none of them
