"""Log-probabilities and entropies of response tokens from hidden states, without logits of the whole batch.

The output head runs over chunks of tokens: one chunk's logits exist at a time, in float32 for the softmax, and are
computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK = 256
"""Tokens per chunk: 256 x 49,152 logits are 50 MB in float32."""


class _TokenLogprobs(torch.autograd.Function):
    """(N, H) hidden states -> log-probability of each target and entropy of each distribution, (N,) float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.empty_like(logprobs)
        normalisers = torch.empty_like(logprobs)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _scaled_logits(hidden[part], weight, temperature)  # (n, V)
            highest = logits.amax(dim=-1, keepdim=True)
            logits.sub_(highest)
            unnormalised = torch.exp(logits)
            total = unnormalised.sum(dim=-1)
            log_total = torch.log(total)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - log_total
            normalisers[part] = log_total + highest.squeeze(1)
            # H = -sum p log p = log sum exp(l) - sum p l, for logits l shifted by their maximum
            entropies[part] = log_total - torch.linalg.vecdot(unnormalised, logits) / total
        ctx.save_for_backward(hidden, weight, targets, normalisers, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor) -> Any:  # type: ignore[override]
        hidden, weight, targets, normalisers, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropies.any())
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _scaled_logits(hidden[part], weight, ctx.temperature)
            log_p = logits.sub_(normalisers[part, None])
            p = torch.exp(log_p)
            # d logp_y / d logit_v = 1[v = y] - p_v;  d H / d logit_v = -p_v (log p_v + H)
            factor = grad_logprobs[part, None]
            if with_entropy:
                factor = factor + grad_entropies[part, None] * (log_p + entropies[part, None])
            grad = p.mul_(-factor)
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            if ctx.temperature != 1.0:
                grad.div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[part]).float()
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _scaled_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def token_logprobs(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of ``targets`` and entropies under ``softmax(head(hidden) / temperature)``, (N,) float32 each.

    ``hidden`` is (N, H), ``targets`` (N,). The matrix product runs in autocast's type, the softmax in float32. A head
    that is more than a plain bias-free linear layer (an adapter, a bias) is run as it is, with logits of all N tokens.
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
