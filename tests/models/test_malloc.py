"""Memory that C's allocator keeps of freed blocks goes back to the system when it is asked to."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from align.models import malloc
from benchmarks.memory_run import memory

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and asks glibc")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_blocks_go_back_to_the_system():
    blocks = [torch.ones(16, 1024) for _ in range(3200)]  # 64 KiB each, from the heap
    full = memory("VmRSS")
    pinned = blocks[::160]  # what is on top of the heap keeps all below it
    del blocks
    remaining = memory("VmRSS")
    malloc.trim_malloc()
    assert memory("VmRSS") < full - 150 * MIB
    assert len(pinned) == 20
    assert remaining > full - 50 * MIB, "glibc gave it back by itself: nothing was tested"


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: pytest.fail("looked for glibc"))
    malloc.trim_malloc()
