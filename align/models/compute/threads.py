"""Threads, device and memory of a process. They change speed, and results only by rounding.

glibc keeps the small blocks that a backward pass frees in its heap, as much as all activations together. Large blocks,
such as logits, are then allocated on top of it. Trimming pays off between passes of different kinds. Large blocks it
gives back at once, and the system clears them page by page when they are asked for again. Keeping them pays off where
passes of one kind follow each other. On other C libraries there is no effect.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.launch import local_size
from align.errors import UserError
from align.pipeline.process_limits import usable_cores


def use_threads(runtime: Runtime) -> int:
    """Set torch's thread count to ``runtime.threads``, or to this process's share of the cores, and return it.

    ``accelerate launch`` sets ``OMP_NUM_THREADS=1`` on a CPU, which would leave all other cores idle.
    """
    import torch

    threads = runtime.threads or max(1, usable_cores() // local_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def device_of(runtime: Runtime) -> Any:
    """Return the ``torch.device`` to work on. Raises ``UserError`` when CUDA is required and not available."""
    import torch

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
