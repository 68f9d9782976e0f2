"""Pages of memory for a stage's process: 2 MiB if the machine provides them quickly, otherwise 4 KiB. Torch-free.

glibc returns large blocks to the kernel at once, and a training step requests the same blocks again and again. With
pages of 2 MiB this costs little: PPO's learning on SmolLM2-135M needs 6.8 s with them and 7.8 s without.

A virtual machine may return free blocks of 2 MiB to its host. Each new block can then cost a request to the host for
every 4 KiB in it: 50 ms instead of 0.5 ms (docs/performance.md). Small pages are mostly pages that a process has used
before, and the host has not reclaimed them.
"""

from __future__ import annotations

import mmap
import time
from functools import cache

HUGE_PAGE = 2 * 2**20
PROBE = 256 * 2**20
"""Bytes that the probe allocates: more than what a process that has just ended may have left in the guest."""
SECONDS = 0.25
"""Most time for that; machines with fast pages need about 0.05 s."""


@cache
def page_environment() -> dict[str, str]:
    """Return the variables that select the pages of a stage's process; measured once per process."""
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if has_fast_huge_pages() else {}


def has_fast_huge_pages() -> bool:
    """Return True if the kernel provides ``PROBE`` bytes in new pages of 2 MiB within ``SECONDS``."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return False
    with mmap.mmap(-1, PROBE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(advice)
        except OSError:  # a kernel without them
            return False
        end = time.perf_counter() + SECONDS
        for start in range(0, PROBE, HUGE_PAGE):
            # The kernel may provide small pages nevertheless, so touch each of them.
            for page in range(start, start + HUGE_PAGE, mmap.PAGESIZE):
                memory[page] = 1
            if time.perf_counter() > end:
                return False
    return True
