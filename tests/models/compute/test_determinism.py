"""Deterministic kernels: torch's switch, what the libraries read, and the scan that a GPU lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from align.models.compute.processes import cumulative_sum

SCRIPT = """
import os, torch
from align.models.compute.processes import use_deterministic_kernels
torch.backends.cudnn.benchmark = True
use_deterministic_kernels()
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
      torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
      os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["FLASH_ATTENTION_DETERMINISTIC"])
"""


def test_only_deterministic_kernels_are_left_and_others_are_errors() -> None:
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


def test_a_scan_on_a_gpu_moves_to_the_processor_in_deterministic_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 3.0], [3.0, 7.0]])
    assert torch.equal(cumulative_sum(values, dim=1), expected)
    on_gpu = values.as_subclass(OnGpu)
    assert torch.equal(cumulative_sum(on_gpu, dim=1), expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="does not have a deterministic"):
        on_gpu.cumsum(dim=1)
    assert torch.equal(cumulative_sum(on_gpu, dim=1), expected)
