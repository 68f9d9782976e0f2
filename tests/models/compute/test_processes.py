"""Threads, memory and deterministic kernels of a process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from align.config.runtime import Runtime
from align.errors import UserError
from align.models.compute import processes as malloc
from align.models.compute.processes import cumulative_sum, device_of, use_threads
from align.pipeline.process_limits import usable_cores
from benchmarks.memory_run import memory


def test_threads_from_the_runtime_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        assert use_threads(Runtime(threads=3)) == torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert use_threads(Runtime()) == torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(before)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Runtime()).type == "cpu"
    with pytest.raises(UserError, match=r"runtime\.device is cuda"):
        device_of(Runtime(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(Runtime()).type == "cuda"
    assert device_of(Runtime(device="cpu")).type == "cpu"


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
from align.models.compute.processes import keep_freed_memory
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
from align.models.compute.processes import untrimmed_heap
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


SCRIPT = """
import os, torch
from align.models.compute.processes import use_deterministic_kernels
torch.backends.cudnn.benchmark = True
use_deterministic_kernels()
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
      torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
      os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["FLASH_ATTENTION_DETERMINISTIC"])
"""


def test_kernels_that_are_not_deterministic_raise() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True", "False", ":4096:8", "1"]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, whose scan is refused as torch refuses it there."""

    is_cuda = True

    def cumsum(self, dim: int) -> torch.Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return super().cumsum(dim)

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_gpu_scan_moves_to_the_cpu_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 3.0], [3.0, 7.0]])
    assert torch.equal(cumulative_sum(values, dim=1), expected)
    on_gpu = values.as_subclass(OnGpu)
    assert torch.equal(cumulative_sum(on_gpu, dim=1), expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="does not have a deterministic"):
        on_gpu.cumsum(dim=1)
    assert torch.equal(cumulative_sum(on_gpu, dim=1), expected)


@torch.inference_mode()
def test_resting_weights_come_back_as_they_were() -> None:
    with torch.inference_mode(False):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        model.requires_grad_(False)[2].requires_grad_(True)
        model[1].weight.data = model[0].weight.data  # two models of one base
    first, second, trained = (layer.weight for layer in model)
    before, place, kept = first.clone(), first.data_ptr(), [trained.data_ptr(), model[0].bias.data_ptr()]
    resting = malloc.RestingWeights(model)
    for _ in range(2):
        resting.leave()
        resting.leave()
        assert resting.is_away and first.data_ptr() == second.data_ptr() != place
        away = first.data_ptr()
        resting.come_back()
        resting.come_back()
        assert not resting.is_away and first.data_ptr() == second.data_ptr() != away
        assert torch.equal(first, before) and not first.is_inference()
    assert [trained.data_ptr(), model[0].bias.data_ptr()] == kept
