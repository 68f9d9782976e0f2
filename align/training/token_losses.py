"""Sums over tokens of a loss on distributions, from hidden states: chunk by chunk, made again in the backward pass.

So the logits of one chunk exist at a time. All in float32 but the matrix product, which runs in autocast's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Tokens whose distributions exist at a time."""


def summed_kl(
    base: torch.Tensor, base_head: Any, hidden: torch.Tensor, head: Any, cap: float | None = None
) -> torch.Tensor:
    """Sum over N tokens of KL(base || model), nats, from (N, H) hidden states and the heads over them.

    ``cap`` is the soft cap on logits of models that have one.
    """

    def part(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = _log_softmax(base_head(low), cap)
        return (wanted.exp() * (wanted - _log_softmax(head(high), cap))).sum()

    return _summed(part, base, hidden)


def summed_nll(targets: torch.Tensor, hidden: torch.Tensor, head: Any, cap: float | None = None) -> torch.Tensor:
    """Sum over N tokens of -log p(target), nats; ``targets`` is (N,), ``hidden`` (N, H)."""

    def part(wanted: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return -_log_softmax(head(states), cap).gather(1, wanted[:, None]).sum()

    return _summed(part, targets, hidden)


def _summed(
    part: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], one: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(part, one[chunk], hidden[chunk], use_reentrant=False, preserve_rng_state=False)
    return total


def _log_softmax(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if cap is None else cap * torch.tanh(logits / cap), dim=-1)
