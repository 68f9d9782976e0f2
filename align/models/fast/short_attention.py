"""Attention of short sequences by matrix products, which a CPU computes faster than torch's flash kernel there."""

from __future__ import annotations

import math
from typing import Any

import torch

QUERY_BLOCK = 128
"""Queries of a long sequence that a CPU takes at a time: none of them attends beyond the last of its block."""
VECTOR = 32
"""Numbers in bfloat16 that a vector register of AVX-512 holds."""
LONG_REST = 1 / 8
"""Share of the keys behind the last whole vector from which a softmax in bfloat16 is the slower one."""


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T scale) v of (S, h, Q, D) queries and (S, g, K, D) keys; g divides h, as in grouped-query attention.

    The first K - Q keys are a prefix, the others the queries' own. Queries that share keys are multiplied together, a
    block of them at a time with the keys up to its end: causal masks hide about half of the rest. The backward pass
    recomputes the weights instead of keeping them.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """(S, h, Q, D), (S, g, K, D), (S, g, K, D) -> (S, h, Q, D); ``mask`` is 0 or -inf, (S or 1, 1, Q, K)."""
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        results = []
        for queries, keys in _query_blocks(q.shape[2], k.shape[2]):
            block = _by_group(q[:, :, queries], k.shape[1])
            scores = _masked_scores(block, k[:, :, keys], mask[:, :, queries, keys], scale)
            results.append(_by_head(_softmax(scores).to(v.dtype) @ v[:, :, keys], q.shape[1]))
        return results[0] if len(results) == 1 else torch.cat(results, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(S, h, Q, D) -> gradients of q, k and v in their shapes."""
        q, k, v, mask = ctx.saved_tensors
        grads_q = []
        # A key gets a gradient from each block behind it. In bfloat16 their sum would lose its last bits.
        wide = _wide(k)
        grad_k, grad_v = (torch.zeros_like(tensor, dtype=wide) for tensor in (k, v))
        for queries, keys in _query_blocks(q.shape[2], k.shape[2]):
            block, block_grad = (_by_group(tensor[:, :, queries], k.shape[1]) for tensor in (q, grad))
            scores = _masked_scores(block, k[:, :, keys], mask[:, :, queries, keys], ctx.scale)
            weights = torch.softmax(scores.to(wide), dim=-1)
            grad_v[:, :, keys] += weights.to(grad.dtype).transpose(-1, -2) @ block_grad
            grad_weights = (block_grad @ v[:, :, keys].transpose(-1, -2)).to(wide)
            # Softmax, row by row: d score = w * (g - sum w g).
            inner = (grad_weights * weights).sum(dim=-1, keepdim=True)
            grad_scores = grad_weights.sub_(inner).mul_(weights).mul_(ctx.scale).to(q.dtype)
            grads_q.append(_by_head(grad_scores @ k[:, :, keys], q.shape[1]))
            grad_k[:, :, keys] += grad_scores.transpose(-1, -2) @ block
        return torch.cat(grads_q, dim=2), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _query_blocks(queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Return blocks of queries and, for each, the keys that its queries may attend to: the prefix and its own.

    A rest of less than half a block is no block of its own.
    """
    starts = range(0, max(1, queries - QUERY_BLOCK // 2), QUERY_BLOCK)
    ends = [*starts[1:], queries]
    prefix = keys - queries
    return [(slice(start, end), slice(0, prefix + end)) for start, end in zip(starts, ends, strict=True)]


def _by_group(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(S, h, Q, D) -> (S, g, h / g Q, D)."""
    return rows.contiguous().view(len(rows), groups, -1, rows.shape[-1])


def _by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(S, g, h / g Q, D) -> (S, h, Q, D)."""
    return rows.view(len(rows), heads, -1, rows.shape[-1])


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the keys of (S, g, h / g Q, K) scores; it computes in float32 and rounds once, if at all.

    torch's kernel for bfloat16 takes the keys behind the last whole vector one by one: 56 keys take three times as long
    as by way of float32, 64 keys a quarter less.
    """
    keys = scores.shape[-1]
    has_long_rest = keys % VECTOR > keys * LONG_REST
    return torch.softmax(scores, dim=-1, dtype=_wide(scores) if has_long_rest else None)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 for such a tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _masked_scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scores (S, g, h / g Q, K), in float32 where they would lose bits in ``q``'s type."""
    # A power of two, as the scale of heads of 64 or 256 is, multiplies the queries without rounding.
    is_exact = math.frexp(scale)[0] == 0.5
    scores = (q * scale if is_exact else q) @ k.transpose(-1, -2)
    scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, :, None])
    return scores if is_exact else scores.to(_wide(q)).mul_(scale)
