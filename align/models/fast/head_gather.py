"""Copy the rows of single heads from a row of tokens into groups of sequences, and back.

Matrix products of attention need (S, h, W, D) blocks. Rows of one head are copied to their place in such a block at
once: to copy a token's heads together and transpose them later takes twice as long.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class PrefixCopies:
    """A run of keys that several segments of a group have again."""

    group: int
    segments: torch.Tensor
    """Indices of the segments in their group."""
    slots: slice
    """Where it stands in each of them."""
    tokens: slice
    """Where it stands in the row."""


@dataclass
class HeadGather:
    """Where the rows (N h, D) of all tokens and heads go in the groups, and back.

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
        sources, slot_places = [], []
        start = 0
        for count, width in shapes:
            # 1. Where each place of the group takes its row from. A token's heads follow each other in the row.
            tokens = slot_tokens[start : start + count * width].view(count, 1, width)
            sources.append((tokens * heads + head[None, :, None]).flatten())
            # 2. The other way round: all places of the group in order, and for each slot those of its heads.
            places = torch.arange(start * heads, (start + count * width) * heads, device=head.device)
            # (S, h, W) -> the places of each slot, (S * W, h)
            slot_places.append(places.view(count, heads, width).transpose(1, 2).reshape(-1, heads))
            start += count * width
        rows = torch.cat(sources)
        # Padding stands for token N, whose heads would follow the last row: any row serves, as nothing attends to it.
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
        # The responses to a prompt hold it in the same slots: one sum takes all of a group.
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
    """Copy rows back from the groups. What is left out is padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: HeadGather) -> torch.Tensor:  # type: ignore[override]
        """Map shape (M h, D) to (N h, D)."""
        ctx.gather = gather
        return rows.index_select(0, gather.places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Map shape (N h, D) to (M h, D)."""
        return grad.index_select(0, ctx.gather.sources).index_fill_(0, ctx.gather.padding, 0), None
