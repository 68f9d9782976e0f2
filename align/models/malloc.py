"""Return freed CPU memory that C's allocator holds to the operating system.

glibc keeps the small blocks that a backward pass frees in its heap, as much as all activations together. Large blocks,
such as logits, are then allocated on top of it. Trimming pays off between passes of different kinds. On other C
libraries nothing happens.
"""

from __future__ import annotations

import ctypes
import gc
import sys


def trim_malloc(garbage: bool = True) -> None:
    """Let glibc return the freed memory that it holds; takes some hundredths of a second per GiB.

    With ``garbage`` objects that refer to one another, as models do, are freed first. Finding them takes some tenths of
    a second, so frequent callers leave it out.
    """
    if garbage:
        gc.collect()
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
