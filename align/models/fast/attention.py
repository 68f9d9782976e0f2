"""Attention of short sequences by matrix products, and the copies of heads' rows that it needs.

Matrix products of attention need (S, h, W, D) blocks. Rows of one head are copied to their place in such a block at
once: to copy a token's heads together and transpose them later lasts twice as long.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

QUERY_BLOCK = 128
"""Queries of a long sequence that a CPU computes at a time: none of them attends beyond the last of its block."""
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

    A rest of less than half a block is no separate block.
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

    torch's kernel for bfloat16 processes the keys behind the last whole vector one by one: 56 keys last three times as
    long as by way of float32, 64 keys a quarter less.
    """
    keys = scores.shape[-1]
    has_long_rest = keys % VECTOR > keys * LONG_REST
    return torch.softmax(scores, dim=-1, dtype=_wide(scores) if has_long_rest else None)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 for such a tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _masked_scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scores (S, g, h / g Q, K), in float32 if they would lose bits in ``q``'s type."""
    # A power of two, as the scale of heads of 64 or 256 is, multiplies the queries without rounding.
    is_exact = math.frexp(scale)[0] == 0.5
    scores = (q * scale if is_exact else q) @ k.transpose(-1, -2)
    scores.unflatten(2, (-1, mask.shape[2])).add_(mask[:, :, None])
    return scores if is_exact else scores.to(_wide(q)).mul_(scale)


@dataclass
class PrefixCopies:
    """A run of keys that several segments of a group have again."""

    group: int
    segments: torch.Tensor
    """Indices of the segments in their group."""
    slots: slice
    """Its place in each of them."""
    tokens: slice
    """Its place in the row."""


@dataclass
class HeadGather:
    """Places of the rows (N h, D) of all tokens and heads in the groups, and back.

    Group after group, the groups hold (S, h, W) rows, for S segments of W slots. ``sources`` (M h,): the row that is
    copied to each of these; any row for padding. ``padding``: the places of padding. ``places`` (N h,): the place of
    each row, for keys that within its own segment.
    """

    heads: int
    shapes: list[tuple[int, int]]
    """Segments and slots of each group."""
    sources: torch.Tensor
    padding: torch.Tensor
    places: torch.Tensor
    copies: list[PrefixCopies] = field(default_factory=list)
    """Runs of keys that are there again, for segments that continue others."""

    @classmethod
    def of_slots(
        cls, shapes: list[tuple[int, int]], slot_tokens: torch.Tensor, token_slots: torch.Tensor, heads: int
    ) -> HeadGather:
        """Spread the tokens of slots (M,) and the slots of tokens (N,) over the heads."""
        total = len(token_slots)
        head = torch.arange(heads, device=slot_tokens.device)
        sources = []
        slot_places = []
        start = 0
        for count, width in shapes:
            # 1. Where each place of the group gets its row from. A token's heads follow each other in the row.
            tokens = slot_tokens[start : start + count * width].view(count, 1, width)
            sources.append((tokens * heads + head[None, :, None]).flatten())
            # 2. The other way round: all places of the group in order, and for each slot its heads' places.
            places = torch.arange(start * heads, (start + count * width) * heads, device=head.device)
            # (S, h, W) -> the places of each slot, (S * W, h)
            slot_places.append(places.view(count, heads, width).transpose(1, 2).reshape(-1, heads))
            start += count * width
        rows = torch.cat(sources)
        # Padding stands for token N, whose heads would follow the last row: any row serves, as no query attends to it.
        return cls(
            heads=heads,
            shapes=shapes,
            sources=rows.clamp(max=total * heads - 1),
            padding=(rows >= total * heads).nonzero().flatten(),
            places=torch.cat(slot_places)[token_slots].flatten(),
        )

    def add_copies(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Add the runs of keys that are there again, (slot, token, count) each, as a ``Layout`` has them."""
        first_slots = list(itertools.accumulate((count * width for count, width in self.shapes), initial=0))
        # The responses to a prompt hold it in the same slots: one sum covers all of a group.
        segments: dict[tuple[int, int, int, int], list[int]] = {}
        for slot, token, count in copies:
            group = bisect.bisect_right(first_slots, slot) - 1
            segment, offset = divmod(slot - first_slots[group], self.shapes[group][1])
            segments.setdefault((group, offset, token, count), []).append(segment)
        for (group, offset, token, count), members in segments.items():
            self.copies.append(
                PrefixCopies(
                    group,
                    torch.tensor(members, device=self.places.device),
                    slice(offset, offset + count),
                    slice(token, token + count),
                )
            )

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return each group's part of (M h, D) rows as (S, h, W, D)."""
        parts = rows.split([count * self.heads * width for count, width in self.shapes])
        return [
            part.view(count, self.heads, width, rows.shape[-1])
            for part, (count, width) in zip(parts, self.shapes, strict=True)
        ]


class ToGroups(torch.autograd.Function):
    """Copy rows into groups, where keys may be in their own segment and again in those that continue it.

    The gradient of a row that is there once is a copy. Others get their sum, in float32: a prefix that many segments
    share would lose the last bits in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: HeadGather) -> torch.Tensor:  # type: ignore[override]
        """Map shape (N h, D) to (M h, D)."""
        ctx.gather = gather
        return rows.index_select(0, gather.sources)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Map shape (M h, D) to (N h, D)."""
        gather: HeadGather = ctx.gather
        rows = grad.index_select(0, gather.places)
        if not gather.copies:
            return rows, None
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.to(wide).view(-1, gather.heads, grad.shape[-1])  # (N, h, D)
        groups = gather.split(grad)
        for run in gather.copies:  # whole slices: index_add_ on a CPU goes row by row
            again = groups[run.group][:, :, run.slots].index_select(0, run.segments)  # (s, h, count, D)
            total[run.tokens] += again.sum(dim=0, dtype=wide).transpose(0, 1)
        return total.to(grad.dtype).flatten(0, 1), None


class FromGroups(torch.autograd.Function):
    """Copy rows back from the groups. What is omitted is padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: HeadGather) -> torch.Tensor:  # type: ignore[override]
        """Map shape (M h, D) to (N h, D)."""
        ctx.gather = gather
        return rows.index_select(0, gather.places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Map shape (N h, D) to (M h, D)."""
        return grad.index_select(0, ctx.gather.sources).index_fill_(0, ctx.gather.padding, 0), None
