"""C's allocator gives freed memory back to the system, or keeps it, as it is told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from align.models.compute import threads as malloc
from benchmarks.memory_run import memory

MIB = 2**20


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and asks glibc")
@needs_glibc
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


COUNT_FAULTS = """
import ctypes, resource, sys
from align.models.compute.threads import keep_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if "keep" in sys.argv:
    keep_freed_memory()

def pass_():
    blocks = [c.malloc(6 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 6 << 20)
    for block in blocks:
        c.free(block)

for _ in range(3):
    pass_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    pass_()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Counts the pages that the system clears for blocks of 6 MiB, four at a time, as a gated MLP asks for them."""


@needs_glibc
def test_blocks_of_a_pass_are_there_for_the_next_one():
    command = [sys.executable, "-c", COUNT_FAULTS]
    plain, kept = (int(subprocess.check_output([*command, mode])) for mode in ("plain", "keep"))
    assert plain > 20, "glibc kept them by itself: nothing was tested"
    assert kept < plain / 10


LOOP = """
import ctypes, resource
from align.models.compute.threads import untrimmed_heap
from benchmarks.memory_run import memory
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
MIB = 1 << 20

def step():
    blocks = [(c.malloc(size * MIB), size * MIB) for size in (3, 120, 6, 50)]
    for block, size in blocks:
        ctypes.memset(block, 1, size)
    for block, _ in blocks:
        c.free(block)

def faults_of_steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = memory("VmRSS")
outside = faults_of_steps()
with untrimmed_heap():
    inside = faults_of_steps()
    kept = memory("VmRSS") - start
print(outside, inside, faults_of_steps(), kept // MIB, (memory("VmRSS") - start) // MIB)
"""
"""Prints the cleared pages of steps before, in and behind the context, and MiB more than at the start in and behind it.

A step has blocks as full tuning asks for them: some above the 32 MiB that glibc's own heap takes at most.
"""


@needs_glibc
def test_a_loop_keeps_blocks_of_every_size_until_it_ends():
    output = subprocess.check_output([sys.executable, "-c", LOOP])
    outside, inside, behind, kept, left = map(int, output.split())
    assert outside > 100, "glibc kept them by itself: nothing was tested"
    assert inside < 10
    assert behind > 100, "large blocks come from the system again"
    assert kept > 170
    assert left < kept - 100


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: pytest.fail("looked for glibc"))
    malloc.trim_malloc()
    malloc.keep_freed_memory()
    with malloc.untrimmed_heap():
        pass
