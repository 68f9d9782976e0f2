"""Log-probabilities and entropies of response tokens from hidden states, without logits of the entire batch.

The output head runs over blocks of the vocabulary. The logits of one block exist at a time, in float32 for the softmax
and small enough to stay in a core's cache. The backward pass computes them again instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

TOKENS = 1024
"""Tokens per pass through the head."""
LOGITS = {"cpu": 2**20, "cuda": 2**24}
"""Logits of a block, 4 bytes each: 4 MiB stay in the caches of a few cores; a GPU prefers large kernels."""

Temperature = float | torch.Tensor
"""Divisor of the logits: a number for all tokens, or one for each, (N, 1)."""


class _TokenLogprobs(torch.autograd.Function):
    """(N, H) hidden states -> log-probability of each target and entropy of each distribution, (N,) float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: Temperature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies, (N,) each, of hidden states (N, H) and targets (N,)."""
        slices = [slice(start, start + TOKENS) for start in range(0, len(hidden), TOKENS)]
        parts = [_forward(hidden[part], weight, targets[part], _part_of(temperature, part)) for part in slices]
        empty = hidden.new_empty(0, dtype=torch.float32)
        logprobs, normalizers, entropies = (torch.cat(pieces) for pieces in zip((empty,) * 3, *parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor) -> Any:  # type: ignore[override]
        """Return gradients of the hidden states (N, H) and, if it is trained, of the head's weight (V, H)."""
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropies.any())
        for start in range(0, len(hidden), TOKENS):
            part = slice(start, start + TOKENS)
            states = hidden[part]
            rows = torch.arange(len(states), device=hidden.device)
            temperature = _part_of(ctx.temperature, part)
            # d logp_y / d logit_v = 1[v = y] - p_v;  d H / d logit_v = -p_v (log p_v + H)
            factor = -grad_logprobs[part, None]
            for block, logits in _blocks(states, weight, temperature):
                log_p = logits.sub_(normalizers[part, None])
                if with_entropy:
                    by_entropy = (log_p + entropies[part, None]).mul_(grad_entropies[part, None])
                    grad = log_p.exp_().mul_(by_entropy.neg_().add_(factor))
                else:
                    grad = log_p.exp_().mul_(factor)
                inside, column = _within(targets[part], block)
                grad[rows[inside], column] += grad_logprobs[part][inside]
                low = _divided(grad, temperature).to(hidden.dtype)
                grad_hidden[part] += low @ weight[block]
                if grad_weight is not None:
                    grad_weight[block] += low.T @ states
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: Temperature
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, logarithms of the softmax's denominators, and entropies, (n,) each.

    Online softmax: the maximum so far, and sums relative to it, are updated block by block (arXiv 1805.02867).
    """
    highest = hidden.new_full((len(hidden), 1), float("-inf"), dtype=torch.float32)
    total, weighted = torch.zeros_like(highest), torch.zeros_like(highest)  # sums of e^d and of d e^d, d = l - highest
    chosen = torch.zeros_like(highest)
    for block, logits in _blocks(hidden, weight, temperature):
        inside, column = _within(targets, block)
        chosen[inside, 0] = logits[inside, column]
        higher = torch.maximum(highest, logits.amax(dim=-1, keepdim=True))
        shift = (highest - higher).clamp(min=-1e4)  # at the first block -inf, and the factor 0
        lower = torch.exp(shift)
        weighted = lower * (weighted + shift * total)
        total = lower * total
        highest = higher
        logits.sub_(highest)
        unnormalized = torch.exp(logits)
        total += unnormalized.sum(dim=-1, keepdim=True)
        weighted += unnormalized.mul_(logits).sum(dim=-1, keepdim=True)
    log_total = torch.log(total)
    # H = -sum p log p = log sum e^d - sum p d
    logprobs = chosen - highest - log_total
    entropies = log_total - weighted / total
    return logprobs.squeeze(1), (log_total + highest).squeeze(1), entropies.squeeze(1)


def _blocks(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: Temperature
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield parts of the vocabulary, and their float32 logits (n, v)."""
    size = max(256, LOGITS.get(hidden.device.type, LOGITS["cuda"]) // len(hidden))
    for start in range(0, len(weight), size):
        block = slice(start, start + size)
        logits = (hidden @ weight[block].T).float()
        yield block, _divided(logits, temperature)


def _divided(values: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """Divide ``values`` (n, v) by the temperature, in place, and return them."""
    if not isinstance(temperature, torch.Tensor) and temperature == 1.0:
        return values
    return values.div_(temperature)


def _part_of(temperature: Temperature, part: slice) -> Temperature:
    return temperature[part] if isinstance(temperature, torch.Tensor) else temperature


def _within(targets: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask (n,) of the targets that lie in a part of the vocabulary, and their columns there."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, targets[inside] - block.start


def token_logprobs(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, temperature: Temperature
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of ``targets`` and entropies of ``softmax(head(hidden) / temperature)``, (N,) each.

    Both are float32. ``hidden`` is (N, H), ``targets`` (N,), ``temperature`` a number or (N, 1). The matrix product
    runs in autocast's type, the softmax in float32. A head that is more than a plain bias-free linear layer (an
    adapter, a bias) runs as it is, with logits of all N tokens.
    """
    device = hidden.device.type
    if type(head) is not nn.Linear or head.bias is not None:
        return _from_logits(head(hidden).float() / temperature, targets)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    with torch.autocast(device, enabled=False):
        result: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(
            hidden.to(dtype), head.weight.to(dtype), targets, temperature
        )
    return result


def _from_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)
