"""Masks over response tokens, and reductions that ignore padding.

A mask is True on the tokens that the policy sampled. Responses are right-padded. The tokens of an episode that an
environment wrote between two turns are False, as padding is, so a row may have gaps. Every process has all responses of
a rollout, so means are global.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def response_mask(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Return a mask (B, T), True on the first ``lengths[i]`` of ``width`` columns (by default the longest row)."""
    counts = torch.tensor(list(lengths))
    width = int(counts.max()) if width is None else width
    return torch.arange(width)[None, :] < counts[:, None]


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """Return the column of each row's last real token, (B,), of a mask (B, T). Every row needs at least one."""
    # Counting would be wrong if an environment's tokens leave gaps.
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).max(dim=1).values


def value_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return which states have a value, (B, T+1), of a mask (B, T): before each real token, and after the last."""
    states = torch.cat([mask, mask.new_zeros(len(mask), 1)], dim=1)
    return states.scatter(1, last_index(mask)[:, None] + 1, True)


def turn_ends(mask: torch.Tensor) -> torch.Tensor:
    """Return True on the last token of each turn, (B, T): a real token that no real one follows directly."""
    following = torch.cat([mask[:, 1:], mask.new_zeros(len(mask), 1)], dim=1)
    return mask & ~following


def pad_rows(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return ragged rows right-padded with zeros, (B, width)."""
    padded = torch.zeros(len(rows), width, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(list(row), dtype=dtype)
    return padded


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over real tokens, a scalar. Values and mask have one shape, usually (B, T).

    Padding is replaced, not multiplied by 0, because a NaN there would leak.
    """
    total: torch.Tensor = torch.where(mask, values, values.new_zeros(())).sum()
    return total


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``values`` (B, T) over the real tokens, a scalar."""
    return masked_sum(values, mask) / mask.sum().to(values.dtype)


def masked_mean_var(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and population variance of ``values`` (B, T) over the real tokens, as scalars."""
    mean = masked_mean(values, mask)
    return mean, masked_mean((values - mean) ** 2, mask)  # a second pass: one pass would cancel


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    """Return ``values`` (B, T) with the real tokens scaled to variance 1; ``shift_mean`` also moves their mean to 0.

    ``shift_mean`` is used as in lm-human-preferences: advantages are shifted, rewards are not, since moving their mean
    would change the task. Padding comes back as 0.
    """
    mean, variance = masked_mean_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, values.new_zeros(()))
