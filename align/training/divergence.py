"""Losses on next-token distributions, summed over tokens: KL, negative log-likelihood, and distillation (GKD).

All of them start from hidden states and work in chunks of tokens: the logits of one chunk exist at a time, and the
backward pass computes them again. Everything is float32 except the matrix product, which runs in autocast's type.

Distillation measures how far a student's distribution is from its teacher's (GKD, arXiv 2306.13649). If only a
teacher's likeliest tokens are known, teacher and student treat all other tokens as one. The result is a lower bound of
the full divergence, and 0 only if the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from align.models.checkpoints.conversion import plain_of
from align.models.fast.token_logprobs import PLAIN, LogitTransform

Divergence = Literal["forward", "reverse", "jsd"]
CHUNK = 256
"""Tokens whose distributions exist at a time."""
ABSENT = float("-inf")
"""Log-probability of an entry of ``TopTokens`` that is no token."""
NO_MASS = -200.0
"""Log-probability whose probability is 0 in float32. Finite, since 0 times a difference of infinities is not 0."""


@dataclass(frozen=True)
class Measure:
    """Kind of divergence; ``beta`` is the teacher's share of the mixture in ``jsd``."""

    kind: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    """Both models' logits are divided by it."""
    top_k: int | None = None
    """Likeliest tokens of the teacher that are compared one by one; None for all."""

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the divergence (N,) in nats from (N, K) log-probabilities.

        ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd`` (equation 1 there)
        beta KL(teacher || mixture) + (1 - beta) KL(student || mixture), with beta teacher + (1 - beta) student.
        """
        if self.kind == "forward":
            return _kl(teacher, student)
        if self.kind == "reverse":
            return _kl(student, teacher)
        weight = torch.tensor(self.beta, dtype=student.dtype, device=student.device)
        # log(beta p_teacher + (1 - beta) p_student), in log space.
        mixture = torch.logaddexp(teacher + weight.log(), student + torch.log1p(-weight))
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)

    def log_softmax(self, product: torch.Tensor, transform: LogitTransform = PLAIN) -> torch.Tensor:
        """Return (N, V) log-probabilities in float32 at this temperature; ``product`` is the head's."""
        return torch.log_softmax(transform.apply(product.float()) / self.temperature, dim=-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append the joint log-probability of all other tokens: (N, K) -> (N, K + 1)."""
    # Clamp, because rounding can make the sum of probabilities exceed 1.
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7).log()
    return torch.cat([logprobs, rest], dim=-1)


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens: (N, K) ids and log-probabilities, which are ``ABSENT`` for no token."""

    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Live:
    """A teacher's (N, H) hidden states, and the head and the transform that map them to logits."""

    hidden: torch.Tensor
    head: Any
    transform: LogitTransform = PLAIN


def summed_divergence(
    measure: Measure,
    hidden: torch.Tensor,
    head: Any,
    teacher: TopTokens | Live,
    transform: LogitTransform = PLAIN,
) -> torch.Tensor:
    """Return the scalar sum of the divergence over N tokens, in nats; ``hidden`` (N, H) is the student's.

    Where the heads differ in rows (padding of the vocabulary), their common rows are compared.
    """
    if isinstance(teacher, TopTokens):

        def _top_tokens_loss(states: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
            student = measure.log_softmax(head(states), transform).gather(1, ids)
            # An absent token has no mass in either model. Without any token, both have all mass in the tail.
            absent = logprobs == ABSENT
            compared = with_rest(student.masked_fill(absent, NO_MASS))
            return measure.of(compared, with_rest(logprobs.masked_fill(absent, NO_MASS))).sum()

        return _sum_over_chunks(_top_tokens_loss, hidden, teacher.ids, teacher.logprobs)

    def _live_loss(states: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        product = head(states)
        with torch.no_grad():
            teacher_product = teacher.head(teacher_states)
            common = min(teacher_product.shape[-1], product.shape[-1])
            target = measure.log_softmax(teacher_product[:, :common], teacher.transform)
        student = measure.log_softmax(product[:, :common], transform)
        if measure.top_k is None:
            return measure.of(student, target).sum()
        # The teacher's likeliest tokens, and all others as one.
        best = target.topk(min(measure.top_k, common), dim=-1)
        return measure.of(with_rest(student.gather(1, best.indices)), with_rest(best.values)).sum()

    return _sum_over_chunks(_live_loss, hidden, teacher.hidden)


def summed_kl(
    base: torch.Tensor, base_head: Any, hidden: torch.Tensor, head: Any, transform: LogitTransform = PLAIN
) -> torch.Tensor:
    """Return the scalar sum of KL(base || model) over N tokens, in nats, from (N, H) hidden states and their heads.

    ``transform`` applies to both models' logits.
    """

    def _kl_of(base_states: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = _log_softmax(base_head(base_states), transform)
        return (target.exp() * (target - _log_softmax(head(states), transform))).sum()

    return _sum_over_chunks(_kl_of, base, hidden)


def summed_nll(
    targets: torch.Tensor, hidden: torch.Tensor, head: Any, transform: LogitTransform = PLAIN
) -> torch.Tensor:
    """Return the scalar sum of -log p(target) over N tokens, in nats; ``targets`` is (N,), ``hidden`` (N, H)."""

    def _nll_of(token_ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return -_log_softmax(head(states), transform).gather(1, token_ids[:, None]).sum()

    return _sum_over_chunks(_nll_of, targets, hidden)


def _log_softmax(product: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    return torch.log_softmax(transform.apply(product.float()), dim=-1)


def _sum_over_chunks(loss: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Sum ``loss`` over chunks of rows of all ``tensors``; the backward pass computes each chunk again."""
    total = tensors[0].new_zeros((), dtype=torch.float32)
    for start in range(0, len(tensors[0]), CHUNK):
        chunk = [tensor[start : start + CHUNK] for tensor in tensors]
        part: torch.Tensor = checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total


def trunk_and_head(model: Any) -> tuple[Any, Any]:
    """Return trunk and vocabulary head, unwrapped from an adapter; the head is None for a model without one."""
    causal_model = plain_of(model)
    return getattr(causal_model, causal_model.base_model_prefix), causal_model.get_output_embeddings()
