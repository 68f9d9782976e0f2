"""RMS norms that keep less for the backward pass than autograd would: the input, and one number per token.

transformers writes the norm as six operations, and autograd keeps the float32 result of each. Left out: norms that are
not written as Llama's; they work as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467), in float32; returns ``x``'s type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # type: ignore[override]
        """(B, T, H) -> (B, T, H); ``weight`` is (H,)."""
        wide = x.to(torch.float32, copy=True)
        # One pass over the input: its square would be as large. No vecdot: autocast would compute it in bfloat16.
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        scale = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(B, T, H) -> gradients of ``x`` (B, T, H) and ``weight`` (H,)."""
        x, weight, scale = ctx.saved_tensors
        # Copies: what autograd has saved, and what it may still use, stays as it is.
        unit = x.to(torch.float32, copy=True).mul_(scale)  # x / rms
        grad = grad.to(torch.float32, copy=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad.mul_(weight)
        # d unit / d x = (1 - unit unit^T / width) / rms
        projection = (grad * unit).mean(dim=-1, keepdim=True)  # (..., 1)
        return grad.sub_(unit.mul_(projection)).mul_(scale).to(x.dtype), grad_weight, None


def lean_norms(model: Any) -> int:
    """Replace the forward pass of every norm that is written as Llama's; return their number.

    Under autocast these norms return autocast's type, rounded once at the end. Without autocast they compute as before.
    """
    return replace_classes(model, _is_llama_norm, _make_lean)


def replace_classes(model: Any, matches: Callable[[type], bool], make: Callable[[type], type]) -> int:
    """Give every module whose class matches the class that ``make`` derives from it; return their number."""
    changed = 0
    for module in model.modules():
        if matches(type(module)):
            module.__class__ = make(type(module))
            changed += 1
    return changed


def _make_lean(norm: type) -> type:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        device_type = hidden_states.device.type
        if not torch.is_autocast_enabled(device_type):
            plain: torch.Tensor = norm.forward(self, hidden_states)  # type: ignore[attr-defined]
            return plain
        low_precision = hidden_states.to(torch.get_autocast_dtype(device_type))
        normed: torch.Tensor = _RmsNorm.apply(low_precision, self.weight, self.variance_epsilon)
        return normed

    return type(norm.__name__, (norm,), {"forward": forward, "lean": True})


def _is_llama_norm(norm: type) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    if not norm.__name__.endswith("RMSNorm") or hasattr(norm, "lean"):
        return False
    source = source_lines(norm.forward)  # type: ignore[attr-defined]
    return bool(source) and source == source_lines(LlamaRMSNorm.forward)


def source_lines(function: Any) -> list[str]:
    """Return a function's lines without indentation; none where the source is not available."""
    try:
        return [line.strip() for line in inspect.getsource(function).splitlines()]
    except OSError:
        return []
