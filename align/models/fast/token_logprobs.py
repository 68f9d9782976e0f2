"""Log-probabilities and entropies of tokens from hidden states, without logits of the entire batch.

The output head runs over blocks of the vocabulary. The logits of one block exist at a time, in float32 for the softmax
and small enough to stay in a core's cache. The backward pass computes them again instead of keeping them.

Some models scale or cap the product of their head before the softmax. Code that runs trunk and head by themselves
applies this ``LogitTransform`` as well, or it would compute another distribution than the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

TOKENS = 1024
"""Tokens per pass through the head."""
LOGITS = {"cpu": 2**20, "cuda": 2**24}
"""Most logits of a block, 4 bytes each: 4 MiB stay in the caches of a few cores; a GPU prefers large kernels."""
ROWS = 64
"""On a CPU tokens come in multiples of it, and blocks in powers of two, so shapes repeat: oneDNN compiles a
product for each shape, and 60 ms for one over 4,161 words is as long as all products of a short micro-batch."""

Temperature = float | torch.Tensor
"""Divisor of the logits: a number for all tokens, or a number for each, (N, 1)."""


@dataclass(frozen=True)
class LogitTransform:
    """Function from the head's product to the logits."""

    scale: float = 1.0
    cap: float | None = None
    """Bound of the scaled logits, by a tanh; None for a model without one."""

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the shape of ``product``."""
        logits = product if self.scale == 1.0 else self.scale * product
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return the derivative of the logits (N, V) by the head's product, from the logits themselves."""
        if self.cap is None:
            return self.scale
        # y = c tanh(s x / c)  =>  dy / dx = s (1 - tanh^2) = s (1 - (y / c)^2)
        return (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


PLAIN = LogitTransform()
"""The head's product is the logits."""


class TokenStatistics(NamedTuple):
    """Numbers of N predicted tokens, (N,) each; only the first two have gradients."""

    logprobs: torch.Tensor
    """Log-probability of the target, float32."""
    entropies: torch.Tensor
    """Entropy of the distribution in nats, float32."""
    is_top1: torch.Tensor
    """True where the target is the likeliest token; of equal logits the first token counts."""
    mean_logits: torch.Tensor
    """Mean logit over the vocabulary, float32."""


class _TokenStatistics(torch.autograd.Function):
    """(N, H) hidden states -> ``TokenStatistics`` and the logarithm of the softmax's denominator, (N,) each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: Temperature,
        transform: LogitTransform,
    ) -> tuple[torch.Tensor, ...]:
        """Return the statistics of hidden states (N, H), targets (N,) and the head's weight (V, H)."""
        slices = [slice(start, start + TOKENS) for start in range(0, len(hidden), TOKENS)]
        parts = [_OnlineSoftmax(hidden[part], targets[part]) for part in slices]
        # Each slice of tokens meets the vocabulary block by block, so one block of logits is in memory at a time.
        for part, softmax in zip(slices, parts, strict=True):
            for block, logits in _blocks(hidden[part], weight, transform):
                softmax.add(block, _divided(logits, _part_of(temperature, part)))
        columns = [softmax.result(len(weight)) for softmax in parts]
        logprobs, entropies, is_top1, mean_logits, normalizers = (
            torch.cat(pieces) for pieces in zip(_no_statistics(hidden.device), *columns, strict=True)
        )
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature, ctx.transform = temperature, transform
        ctx.mark_non_differentiable(is_top1, mean_logits)
        return logprobs, entropies, is_top1, mean_logits

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor, *no_gradients: Any
    ) -> Any:
        """Return gradients of the hidden states (N, H) and, if it is trained, of the head's weight (V, H)."""
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        # The first product is written, so the sum needs no zeros; without any token it is complete.
        room = torch.empty_like if len(hidden) else torch.zeros_like
        grad_weight = room(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropies.any())
        for start in range(0, len(hidden), TOKENS):
            part = slice(start, start + TOKENS)
            states = hidden[part]
            rows = torch.arange(len(states), device=hidden.device)
            temperature = _part_of(ctx.temperature, part)
            # d logp_y / d logit_v = 1[v = y] - p_v;  d H / d logit_v = -p_v (log p_v + H)
            factor = -grad_logprobs[part, None]
            for block, logits in _blocks(states, weight, ctx.transform):
                slope = ctx.transform.slope(logits)
                log_p = _divided(logits, temperature).sub_(normalizers[part, None])
                if with_entropy:
                    by_entropy = (log_p + entropies[part, None]).mul_(grad_entropies[part, None])
                    grad = log_p.exp_().mul_(by_entropy.neg_().add_(factor))
                else:
                    grad = log_p.exp_().mul_(factor)
                inside, column = _within(targets[part], block)
                grad[rows[inside], column] += grad_logprobs[part][inside]
                if ctx.transform != PLAIN:
                    grad.mul_(slope)
                low = _divided(grad, temperature).to(hidden.dtype)
                grad_hidden[part] += low @ weight[block]
                if grad_weight is not None and start == 0:
                    grad_weight[block] = low.T @ states
                elif grad_weight is not None:
                    grad_weight[block] += low.T @ states
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


@dataclass
class _OnlineSoftmax:
    """Statistics of n tokens over the blocks of the vocabulary seen so far, (n, 1) each.

    Sums are relative to the largest logit so far, and scaled when a larger one appears (arXiv 1805.02867).
    """

    hidden: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        zeros = self.hidden.new_zeros(len(self.hidden), 1, dtype=torch.float32)
        self.highest = torch.full_like(zeros, float("-inf"))
        self.highest_before = torch.full_like(zeros, float("-inf"))
        """Largest logit of the tokens before the target."""
        self.chosen = zeros.clone()
        """Logit of the target."""
        self.total, self.weighted = zeros.clone(), zeros.clone()
        """Sums of e^d and of d e^d, where d is a logit minus the largest one."""
        self.sum = zeros.clone()

    def add(self, block: slice, logits: torch.Tensor) -> None:
        """Add the logits (n, v) of one block, which are overwritten."""
        inside, column = _within(self.targets, block)
        self.chosen[inside, 0] = logits[inside, column]
        self.sum += logits.sum(dim=-1, keepdim=True)
        block_highest = logits.amax(dim=-1, keepdim=True)
        self._add_before(block, inside, column, logits, block_highest)
        higher = torch.maximum(self.highest, block_highest)
        shift = (self.highest - higher).clamp(min=-1e4)  # at the first block -inf, and the factor 0
        factor = torch.exp(shift)
        self.weighted = factor * (self.weighted + shift * self.total)
        self.total = factor * self.total
        self.highest = higher
        logits.sub_(higher)
        unnormalized = torch.exp(logits)
        self.total += unnormalized.sum(dim=-1, keepdim=True)
        self.weighted += unnormalized.mul_(logits).sum(dim=-1, keepdim=True)

    def _add_before(
        self, block: slice, inside: torch.Tensor, column: torch.Tensor, logits: torch.Tensor, highest: torch.Tensor
    ) -> None:
        """Update the largest logit before the target: from the whole block, from its part, or not at all."""
        is_before = (self.targets >= block.stop)[:, None]
        part = logits[inside]  # a copy: each token's target is in one block only
        part.masked_fill_(torch.arange(part.shape[1], device=part.device) >= column[:, None], float("-inf"))
        before = torch.where(is_before, highest, float("-inf"))
        before[inside] = part.amax(dim=-1, keepdim=True)
        self.highest_before = torch.maximum(self.highest_before, before)

    def result(self, vocabulary: int) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities, entropies, ``is_top1``, mean logits and log-denominators, (n,) each."""
        log_total = torch.log(self.total)
        logprobs = self.chosen - self.highest - log_total
        # H = -sum p log p = log sum e^d - sum p d
        entropies = log_total - self.weighted / self.total
        is_top1 = (self.chosen >= self.highest) & (self.chosen > self.highest_before)
        columns = (logprobs, entropies, is_top1, self.sum / vocabulary, log_total + self.highest)
        return tuple(column.squeeze(1) for column in columns)


def _no_statistics(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the columns of no tokens."""
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return empty, empty, empty.bool(), empty, empty


def _blocks(
    hidden: torch.Tensor, weight: torch.Tensor, transform: LogitTransform
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield parts of the vocabulary, and their float32 logits (n, v) at temperature 1."""
    most = max(256, LOGITS.get(hidden.device.type, LOGITS["cuda"]) // len(hidden))
    size = 2 ** (most.bit_length() - 1)
    for start in range(0, len(weight), size):
        block = slice(start, start + size)
        yield block, transform.apply((hidden @ weight[block].T).float())


def _divided(values: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """Divide ``values`` (n, v) by the temperature, in place, and return them."""
    if not isinstance(temperature, torch.Tensor) and temperature == 1.0:
        return values
    return values.div_(temperature)


def _part_of(temperature: Temperature, part: slice) -> Temperature:
    return temperature[part] if isinstance(temperature, torch.Tensor) else temperature


def _within(targets: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a mask (n,) of the targets in a part of the vocabulary, and their columns there."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, targets[inside] - block.start


def token_logprobs(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    temperature: Temperature,
    transform: LogitTransform = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of ``targets`` and entropies of ``softmax(logits / temperature)``, (N,) each.

    Both are float32. The logits are ``transform.apply(head(hidden))``. ``hidden`` is (N, H), ``targets`` (N,),
    ``temperature`` a number or (N, 1). The matrix product runs in autocast's type, the softmax in float32. A head that
    is more than a plain bias-free linear layer (an adapter, a bias) runs as it is, with logits of all N tokens.
    """
    if type(head) is not nn.Linear or head.bias is not None:
        return _from_logits(transform.apply(head(hidden).float()) / temperature, targets)
    statistics = token_statistics(hidden, head.weight, targets, temperature, transform)
    return statistics.logprobs, statistics.entropies


def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: Temperature = 1.0,
    transform: LogitTransform = PLAIN,
) -> TokenStatistics:
    """Return the statistics of ``softmax(transform.apply(hidden weight^T) / temperature)`` at ``targets``.

    ``hidden`` is (N, H), ``weight`` (V, H), ``targets`` (N,). The matrix products run in autocast's type.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    count = len(hidden)
    padding = -count % ROWS if device == "cpu" else 0
    if padding:
        hidden, targets = F.pad(hidden, (0, 0, 0, padding)), F.pad(targets, (0, padding))
        if isinstance(temperature, torch.Tensor):
            temperature = F.pad(temperature, (0, 0, 0, padding), value=1.0)
    with torch.autocast(device, enabled=False):
        columns = _TokenStatistics.apply(hidden.to(dtype), weight.to(dtype), targets, temperature, transform)
    return TokenStatistics(*(column[:count] for column in columns[:4]))


def _from_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of a config that logits are multiplied by (Cohere, Muse Glimmer, Falcon-H1)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Fields with a soft cap (Gemma, RecurrentGemma)."""


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Return the transform that the config of ``model`` asks for."""
    config = model.config.get_text_config()
    scale = _first_set(config, MULTIPLIERS)
    divisor = _first_set(config, ("logits_scaling",))
    if scale is None and divisor is not None:
        # Granite and MiniCPM3 divide by the field that HyperCLOVA X multiplies by.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return LogitTransform(1.0 if scale is None else scale, _first_set(config, CAPS))


def _first_set(config: Any, names: tuple[str, ...]) -> float | None:
    """Return the first of the fields that the config has a value for."""
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)
