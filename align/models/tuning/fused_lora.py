"""Compute a LoRA layer as one function: fewer passes over its activations than peft's sum of two products.

peft computes ``x W^T + s (x A^T) B^T`` with a tensor of the output's size for each product, for the scaled one and for
the sum, and autograd goes through four more in the backward pass. Here the low-rank product is added to the other by
the product itself. ``align.patches.peft`` puts the layer here in the place of peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable

from align.patches.peft import has_hooks, replace_lora_linear


class FusedLoraLinear(Linear):
    """peft's LoRA layer on a matrix; calls that the fused function does not cover take peft's way."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        adapter = None if args or kwargs else self._find_only_adapter()
        weight: Any = self.base_layer.weight
        if adapter is None or not _is_whole(weight):
            return super().forward(x, *args, **kwargs)
        low, high = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        bias: Any = self.base_layer.bias
        tensors: list[Any] = [x, weight, low, high, *([] if bias is None else [bias])]
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            tensors = [tensor.to(dtype) for tensor in tensors]
        elif len({tensor.dtype for tensor in tensors}) > 1:
            return super().forward(x)
        x, weight, low, high, *biases = tensors
        output: torch.Tensor = _LowRankSum.apply(
            x, weight, biases[0] if biases else None, low, high, self.scaling[adapter]
        )
        return output

    def _find_only_adapter(self) -> str | None:
        """Return the one active adapter, where it is plain LoRA that nothing else takes part in."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        name, base = names[0], self.base_layer
        dropout = self.lora_dropout[name]
        if isinstance(dropout, torch.nn.Dropout) and dropout.training and dropout.p > 0:
            return None
        matrices = (base, self.lora_A[name], self.lora_B[name])
        are_plain = name not in self.lora_variant and all(type(matrix) is torch.nn.Linear for matrix in matrices)
        if not are_plain or self.lora_B[name].bias is not None or base.weight.requires_grad:
            return None
        return None if any(map(has_hooks, (*matrices, dropout))) else name


def fuse_lora(model: Any) -> None:
    """Compute ``model``'s LoRA layers on plain matrices by the fused function, in place."""
    replace_lora_linear(model, FusedLoraLinear)


def _is_whole(weight: torch.Tensor) -> bool:
    """Return True for a weight that no wrapper has shared out among processes."""
    return type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.dim() == 2 and not hasattr(weight, "ds_id")


class _LowRankSum(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T of x (..., in), frozen W (out, in) and b (out,), trained A (r, in) and B (out, r)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ low.t()  # (N, r)
        output = torch.nn.functional.linear(rows, weight, bias)
        # Added in place, without another tensor of the output's size.
        output.addmm_(narrow, high.t(), alpha=scale)
        # Views: a parameter whose values are swapped before the backward pass leaves them as they were.
        ctx.save_for_backward(rows, narrow, weight, low.t(), high.t())
        ctx.scale, ctx.shape = scale, x.shape
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(..., out) -> gradients of x, A and B in their shapes."""
        rows, narrow, weight, low_view, high_view = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        # The gradient of x A^T, which the gradients of x and A share.
        grad_narrow = (grad @ high_view.t()).mul_(ctx.scale)  # (N, r)
        grad_x = grad_low = grad_high = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_narrow, low_view.t()).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_low = grad_narrow.t() @ rows
        if ctx.needs_input_grad[4]:
            # The narrow matrix goes first: the product is several times as fast on a CPU.
            grad_high = (narrow.t() @ grad).mul_(ctx.scale).t()
        return grad_x, None, None, grad_low, grad_high, None
