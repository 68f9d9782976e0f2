"""How far a student's next-token distribution is from its teacher's (GKD, arXiv 2306.13649), by log-probabilities.

With only a teacher's most likely tokens, all others count as one token, for the student too: what is measured is a
lower bound of the whole divergence, and still 0 only where the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

Divergence = Literal["forward", "reverse", "jsd"]
CHUNK = 256
"""Tokens whose distributions exist at a time."""


@dataclass(frozen=True)
class Measure:
    """Which divergence; ``beta`` is the teacher's share of the mixture in ``jsd``."""

    kind: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    """Both models' logits are divided by it."""
    top_k: int | None = None
    """Tokens of the teacher that are told apart; None for all."""

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """(N,) nats from (N, K) log-probabilities.

        ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd`` (equation 1 there)
        beta KL(teacher || mixture) + (1 - beta) KL(student || mixture), with beta teacher + (1 - beta) student.
        """
        if self.kind == "forward":
            return _kl(teacher, student)
        if self.kind == "reverse":
            return _kl(student, teacher)
        weight = torch.tensor(self.beta, dtype=student.dtype, device=student.device)
        mixture = torch.logaddexp(teacher + weight.log(), student + torch.log1p(-weight))
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)

    def log_softmax(self, logits: torch.Tensor, cap: float | None) -> torch.Tensor:
        """In float32, at this temperature; ``cap`` is the soft cap of models that have one."""
        logits = logits.float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits / self.temperature, dim=-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """(N, K) log-probabilities of some tokens, and behind them that of all others together."""
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7).log()
    return torch.cat([logprobs, rest], dim=-1)


@dataclass(frozen=True)
class Known:
    """A teacher's most likely tokens, (N, K) ids and log-probabilities."""

    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Live:
    """A teacher's (N, H) hidden states, and what makes logits of them."""

    hidden: torch.Tensor
    head: Any
    cap: float | None = None


def summed_divergence(
    measure: Measure, hidden: torch.Tensor, head: Any, teacher: Known | Live, cap: float | None = None
) -> torch.Tensor:
    """Sum over N tokens, nats; ``hidden`` is the student's, (N, H). Distributions are made again for the gradient.

    Of heads with unlike numbers of rows (padding) the common ones are compared.
    """
    first, second = (teacher.ids, teacher.logprobs) if isinstance(teacher, Known) else (teacher.hidden, None)

    def part(states: torch.Tensor, one: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        logits = head(states)
        if isinstance(teacher, Known):
            assert other is not None
            student = measure.log_softmax(logits, cap).gather(1, one)
            return measure.of(with_rest(student), with_rest(other)).sum()
        with torch.no_grad():
            wanted = teacher.head(one)
            common = min(wanted.shape[-1], logits.shape[-1])
            known = measure.log_softmax(wanted[:, :common], teacher.cap)
        student = measure.log_softmax(logits[:, :common], cap)
        if measure.top_k is None:
            return measure.of(student, known).sum()
        best = known.topk(min(measure.top_k, common), dim=-1)
        return measure.of(with_rest(student.gather(1, best.indices)), with_rest(best.values)).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + _again(part, hidden[chunk], first[chunk], None if second is None else second[chunk])
    return total


def _again(part: Callable[..., torch.Tensor], *given: torch.Tensor | None) -> torch.Tensor:
    made: torch.Tensor = checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False)
    return made
