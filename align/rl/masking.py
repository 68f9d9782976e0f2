"""Masks over response tokens, and reductions that ignore padding.

A mask is True on real tokens. Responses are right-padded, so a row of a mask is True, ..., True, False, ..., False.
Sums take an optional ``reduce`` that adds a tensor up over all processes, so that means are global.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor up over all processes; the identity when there is one."""


def local(total: torch.Tensor) -> torch.Tensor:
    """The ``Reduce`` of a single process."""
    return total


def response_mask(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """True on the first ``lengths[i]`` of ``width`` columns (the longest row by default); (B, T) bool."""
    counts = torch.tensor(list(lengths))
    width = int(counts.max()) if width is None else width
    return torch.arange(width)[None, :] < counts[:, None]


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """Column of each row's last real token; (B,). Every row needs at least one."""
    return mask.sum(dim=1) - 1


def pad_rows(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Right-pad ragged rows with zeros to (B, width)."""
    out = torch.zeros(len(rows), width, dtype=dtype)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.tensor(list(row), dtype=dtype)
    return out


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over real tokens. A NaN in the padding does not leak: it is replaced, not multiplied by zero."""
    total: torch.Tensor = torch.where(mask, values, values.new_zeros(())).sum()
    return total


def masked_mean(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = local) -> torch.Tensor:
    """Mean over the real tokens of all processes."""
    totals = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    return totals[0] / totals[1]


def masked_mean_var(
    values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = local
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population variance over the real tokens of all processes, in two passes as the variance needs."""
    mean = masked_mean(values, mask, reduce)
    return mean, masked_mean((values - mean) ** 2, mask, reduce)


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool, reduce: Reduce = local) -> torch.Tensor:
    """Scale the real tokens to variance one; ``shift_mean=True`` also moves their mean to zero.

    The sense of ``shift_mean`` is that of lm-human-preferences: advantages are shifted, rewards are not, as moving
    their mean would change what is asked for. Padding comes back as zero.
    """
    mean, variance = masked_mean_var(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, values.new_zeros(()))
