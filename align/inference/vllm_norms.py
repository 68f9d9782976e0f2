"""RMS norms of vLLM on a CPU by its own C++ kernels, as of 0.31.

vLLM builds these kernels for CPUs too, but takes them on GPUs alone: on a CPU a norm is ten torch operations. In a
decode step of SmolLM2-135M for 32 sequences on two cores, 61 norms took 25 of 95 ms; the kernels take 1 ms. They round
once, where the operations round before and after the weight, so tokens may differ. Log-probabilities come no further
from those in float32 (docs/performance.md).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

PROVIDER = "align_cpu"
"""Name of these implementations among vLLM's."""
OPERATIONS = ("rms_norm", "fused_add_rms_norm")


def use_cpu_norms() -> bool:
    """Have the norms of all models in this process run by the kernels; call it once vLLM's worker is there.

    False where this vLLM has no such kernels, or runs on an accelerator: it goes on with its own.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or importlib.util.find_spec("vllm.ir") is None:
        return False
    from vllm.ir import ops

    kernels = torch.ops._C
    if not all(hasattr(ops, name) and hasattr(kernels, name) for name in OPERATIONS):
        return False
    if PROVIDER not in ops.rms_norm.impls:
        _register(ops, kernels)
    for name in OPERATIONS:
        # The worker sets the default of its platform when it starts.
        getattr(ops, name).set_default([PROVIDER, "native"])
    return True


def rounds_to_nearest(kernels: Any) -> bool:
    """Return True if the kernels round to the nearest bfloat16. With AVX2 only, they cut off the digits behind it.

    A sum that lost half a digit in every layer would be too small by 0.3 % on average, and not only less exact.
    """
    # 1 + 0.75 of the last digit: 1 + a whole digit (2**-7) is nearest, and 1 is what cutting off leaves.
    rows, residual = torch.ones(1, 32).bfloat16(), torch.full((1, 32), 0.75 * 2**-7).bfloat16()
    kernels.fused_add_rms_norm(rows, residual, torch.ones(32).bfloat16(), 1e-5)
    return bool((residual == 1 + 2**-7).all())


def _register(ops: Any, kernels: Any) -> None:
    """Register both operations; tensors that the kernels cannot take go to vLLM's own implementation."""
    cut_off = () if rounds_to_nearest(kernels) else (torch.bfloat16,)

    def takes(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        """Return True where the kernel takes x (..., H) and weight (H,)."""
        has_weight = weight is not None and weight.dtype == x.dtype
        return has_weight and x.dtype not in cut_off and variance_size is None and x.is_contiguous()

    def takes_residual(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        """Return True where the kernel takes x and the residual, both (..., H), and weight (H,)."""
        return takes(x, weight, epsilon, variance_size) and x_residual.is_contiguous()

    @ops.rms_norm.register_impl(PROVIDER, supports_args=takes)  # type: ignore[untyped-decorator]
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        """Return the norms of rows x (..., H) times weight (H,)."""
        output = torch.empty_like(x)
        kernels.rms_norm(output, x, weight, epsilon)
        return output

    @ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
        PROVIDER, supports_args=takes_residual, inplace=True
    )
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x (..., H) to the residual in place, and return the sum's norms times weight (H,), and the sum."""
        kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual
