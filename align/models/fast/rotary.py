"""Rotary position embeddings in three operations, with a backward pass of their own.

transformers writes them as five operations on each of queries and keys, with a tensor of full size for each, and
autograd goes through all of them again. Left out: rotations that are not written as Llama's; they work as before.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from align.models.fast.norms import replace_classes, source_lines

NAME = "apply_rotary_pos_emb"
"""Function of transformers' models that an attention layer calls by its global name."""


class _Rotate(torch.autograd.Function):
    """x cos + rotate_half(x) sin, where rotate_half maps the halves (a, b) of the last axis to (-b, a)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(B, h, T, D) -> (B, h, T, D) of the same strides; ``cos`` and ``sin`` are (B, 1, T, D)."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        low, high = slice(0, half), slice(half, None)
        rotated = x * cos
        rotated[..., low].addcmul_(x[..., high], sin[..., low], value=-1)
        rotated[..., high].addcmul_(x[..., low], sin[..., high])
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(B, h, T, D) -> (B, h, T, D): the transposed matrix takes (a, b) to (b, -a)."""
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        low, high = slice(0, half), slice(half, None)
        grad_x = grad * cos
        grad_x[..., low].addcmul_(grad[..., high], sin[..., high])
        grad_x[..., high].addcmul_(grad[..., low], sin[..., low], value=-1)
        return grad_x, None, None


def lean_rotary(model: Any) -> int:
    """Let every attention layer of ``model`` that rotates as Llama's does use the function here; return their number.

    Queries and keys in bfloat16 or float16 are rotated by it, and rounded twice rather than three times. In float32
    nothing changes.
    """
    return replace_classes(model, _rotates_as_llama, _make_lean)


def _make_lean(attention: type) -> type:
    forward = attention.forward  # type: ignore[attr-defined]
    plain = forward.__globals__[NAME]

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """Rotate queries (B, h, T, D) and keys (B, g, T, D) by angles (B, T, D)."""
        if q.dtype not in (torch.bfloat16, torch.float16) or cos.requires_grad or cos.dtype != q.dtype:
            return plain(q, k, cos, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)

    # The layer's own code, which finds another function by the global name.
    lean = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, NAME: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    lean.__kwdefaults__ = forward.__kwdefaults__
    return type(attention.__name__, (attention,), {"forward": lean, "has_lean_rotary": True})


def _rotates_as_llama(attention: type) -> bool:
    from transformers.models.llama import modeling_llama

    forward: Any = getattr(attention, "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None or NAME not in code.co_names or hasattr(attention, "has_lean_rotary"):
        return False
    functions = [(forward.__globals__.get(name), getattr(modeling_llama, name)) for name in (NAME, "rotate_half")]
    # A function of another package, such as Liger's, has taken the place of transformers' own for a reason.
    return all(
        function is not None
        and function.__module__ == forward.__module__
        and source_lines(function) == source_lines(original)
        for function, original in functions
    )
