"""Kernels that give equal bits in every run on the same GPU (``runtime.deterministic``).

torch then takes the deterministic one of several kernels, and raises ``RuntimeError`` at an operation that has none.
Left out: equal bits on another card, with another torch, or in another number of processes.
"""

from __future__ import annotations

import os

import torch

SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What cuBLAS reads when it is first used, and transformers at each call of flash-attn's kernels."""


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
