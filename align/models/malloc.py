"""Memory of the CPU that was freed and that C's allocator keeps: given back to the system.

glibc keeps the small blocks that a backward pass frees in its heap, as much as all activations; large ones, such as
logits, then come on top of it. Between passes of different kinds it is worth giving back. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back(garbage: bool = True) -> None:
    """Have glibc return what it keeps of freed memory; some hundredths of a second a GiB.

    Objects that refer to one another, as models do, are freed before; to look for them takes some tenths of a second
    more, so what is done often goes without ``garbage``.
    """
    if garbage:
        gc.collect()
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
