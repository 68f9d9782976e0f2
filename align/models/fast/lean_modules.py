"""RMS norms and gated MLPs with fewer tensors of full size than transformers' modules.

transformers writes a norm as six operations, and autograd keeps the float32 result of each. The norm here keeps its
input and one number per token. An MLP computes ``down(silu(gate(x)) * up(x))`` with a new tensor of the MLP's width for
each of the two operations between the products. Fresh memory is cleared page by page, which on a CPU shows in the time
of a pass (docs/performance.md). The MLP here writes over the gate in passes without gradients: the same numbers.

Modules that are not written as Llama's are not replaced. A replaced module keeps its name and its parameters.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


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


class LeanRMSNorm(nn.Module):
    """A norm that under autocast returns autocast's type, rounded once at the end."""

    weight: torch.Tensor
    variance_epsilon: float

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(norm))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        device_type = hidden_states.device.type
        normed: torch.Tensor
        if torch.is_autocast_enabled(device_type):
            low_precision = hidden_states.to(torch.get_autocast_dtype(device_type))
            normed = _RmsNorm.apply(low_precision, self.weight, self.variance_epsilon)
        else:
            normed = LlamaRMSNorm.forward(self, hidden_states)  # type: ignore[arg-type]  # it has all that is used
        return normed


class LeanMLP(nn.Module):
    """A gated MLP that without gradients writes over its gate. With gradients autograd would copy the gate first."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(mlp))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        output: torch.Tensor
        if torch.is_grad_enabled() or not isinstance(self.act_fn, (SiLUActivation, nn.SiLU)):
            output = LlamaMLP.forward(self, x)  # type: ignore[arg-type]
            return output
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        nn.functional.silu(gate, inplace=True)
        # A product of two types would have the wider type.
        gated = gate.mul_(up) if gate.dtype == up.dtype else gate * up
        output = self.down_proj(gated)
        return output


def lean_norms(model: nn.Module) -> int:
    """Replace every norm that is written as Llama's; return their number."""
    return _replace(model, "RMSNorm", LlamaRMSNorm, LeanRMSNorm)


def lean_mlps(model: nn.Module) -> int:
    """Replace every gated MLP that is written as Llama's; return their number."""
    return _replace(model, "MLP", LlamaMLP, LeanMLP)


def _replace(model: nn.Module, suffix: str, original: type[nn.Module], lean: Any) -> int:
    count = 0
    source = _source(original.forward)
    for parent in model.modules():
        for name, module in list(parent.named_children()):
            kind = type(module)
            # transformers has a copy of the same class for each type of model. Equal source code means equal results.
            is_original = kind.__name__.endswith(suffix) and source is not None and _source(kind.forward) == source
            if is_original:
                setattr(parent, name, lean(module))
                count += 1
    return count


def _source(function: Any) -> list[str] | None:
    """Return a function's lines without indentation; None if the source is not available."""
    try:
        return [line.strip() for line in inspect.getsource(function).splitlines()]
    except OSError:
        return None
