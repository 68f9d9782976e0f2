"""The input of a method's function: a micro-batch's log-probabilities or scores, and the rows behind them.

Log-probabilities are in nats. A mask is True on the tokens that are learned. Only values of the trained model have a
gradient. ``align`` sums what the function returns and divides by the counts of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

Row = Mapping[str, Any]

LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: far outside any clip range, and still finite in float32 (as in verl and OpenRLHF)."""


def _unchanged(logratios: torch.Tensor) -> torch.Tensor:
    return logratios


@dataclass(frozen=True)
class PairLogprobs:
    """Both answers of B pairs, for a loss that returns one number per pair, (B,)."""

    chosen_logprobs: torch.Tensor
    """Sum of the policy's log-probabilities over the tokens of each chosen answer, (B,)."""
    rejected_logprobs: torch.Tensor
    """The same of the rejected answers, (B,)."""
    ref_chosen_logprobs: torch.Tensor
    """The reference's sum over the chosen answer, (B,)."""
    ref_rejected_logprobs: torch.Tensor
    """The reference's sum over the rejected answer, (B,)."""
    chosen_token_logprobs: torch.Tensor
    """The policy's log-probability of each token, 0 outside the mask, (B, T)."""
    rejected_token_logprobs: torch.Tensor
    """The same of the rejected answers, (B, T)."""
    chosen_mask: torch.Tensor
    """True on the tokens of the chosen answers, (B, T)."""
    rejected_mask: torch.Tensor
    """True on the tokens of the rejected answers, (B, T)."""
    rows: Sequence[Row] = ()
    """The rows of the pairs, with the columns that the recipe keeps. Shipped losses get none."""
    divergence: Callable[[torch.Tensor], torch.Tensor] = _unchanged
    """Derivative of the f-divergence of ``f_divergence_type``, as a function of log-ratios."""

    def __len__(self) -> int:
        return len(self.chosen_logprobs)

    @cached_property
    def chosen_logratios(self) -> torch.Tensor:
        """Log of the policy's probability over the reference's, (B,); beta times it is DPO's implicit reward."""
        return self.chosen_logprobs - self.ref_chosen_logprobs

    @cached_property
    def rejected_logratios(self) -> torch.Tensor:
        """The same of the rejected answers, (B,)."""
        return self.rejected_logprobs - self.ref_rejected_logprobs

    @cached_property
    def chosen_scores(self) -> torch.Tensor:
        """``chosen_logratios`` under the divergence, which for the reverse KL are the log-ratios themselves, (B,)."""
        return self.divergence(self.chosen_logratios)

    @cached_property
    def rejected_scores(self) -> torch.Tensor:
        """``rejected_logratios`` under the divergence, (B,)."""
        return self.divergence(self.rejected_logratios)

    @cached_property
    def margins(self) -> torch.Tensor:
        """Chosen minus rejected scores, (B,)."""
        return self.chosen_scores - self.rejected_scores

    @cached_property
    def mean_margins(self) -> torch.Tensor:
        """The margins of scores per token, (B,)."""
        chosen = self.chosen_scores / self.chosen_lengths.clamp(min=1.0)
        return chosen - self.rejected_scores / self.rejected_lengths.clamp(min=1.0)

    @property
    def chosen_lengths(self) -> torch.Tensor:
        """Tokens of each chosen answer, (B,)."""
        return self.chosen_mask.sum(dim=1)

    @property
    def rejected_lengths(self) -> torch.Tensor:
        """Tokens of each rejected answer, (B,)."""
        return self.rejected_mask.sum(dim=1)


@dataclass(frozen=True)
class PairScores:
    """A reward model's scores of B pairs, for a loss that returns one number per pair, (B,)."""

    chosen_scores: torch.Tensor
    """Scores of the chosen answers, (B,)."""
    rejected_scores: torch.Tensor
    """Scores of the rejected answers, (B,)."""
    margins: torch.Tensor
    """Margin that each pair should have by the field ``margin``; 0 without one, (B,)."""
    rows: Sequence[Row] = ()
    """The rows of the pairs. Shipped losses get none."""

    def __len__(self) -> int:
        return len(self.chosen_scores)


@dataclass(frozen=True)
class AnswerTokens:
    """B answers of supervised fine-tuning, for a loss that returns one number per token, (B, T)."""

    logprobs: torch.Tensor
    """The model's log-probability of each token, 0 outside the mask, (B, T)."""
    mask: torch.Tensor
    """True on the tokens of answers, (B, T)."""
    rows: Sequence[Row] = ()
    """The rows of the answers. Shipped losses get none."""

    def __len__(self) -> int:
        return len(self.logprobs)

    @property
    def position(self) -> torch.Tensor:
        """Number of each learned token within its answer, 0 for the first, (B, T)."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True)
class ResponseTokens:
    """B sampled responses, for a loss that returns one number per token, (B, T), or one per response, (B,)."""

    new_logprobs: torch.Tensor
    """Log-probabilities of the policy that is being updated, (B, T)."""
    logprobs: torch.Tensor
    """Log-probabilities of the policy that sampled, recomputed by the trainer, (B, T)."""
    sampler_logprobs: torch.Tensor
    """Log-probabilities that the engine gave, NaN for tokens without one, (B, T)."""
    ref_logprobs: torch.Tensor
    """Log-probabilities of the reference, (B, T)."""
    advantages: torch.Tensor
    """Advantage of each token; of methods without a critic the same for all tokens of a response, (B, T)."""
    entropy: torch.Tensor
    """Entropy of the updated policy's distribution at each token, in nats, (B, T)."""
    mask: torch.Tensor
    """True on tokens that are learned: sampled by the policy, in responses that count, (B, T)."""
    group: torch.Tensor
    """Number of each response's prompt, equal for responses to the same prompt, (B,)."""
    values: torch.Tensor | None = None
    """The critic's value of the state before each token, (B, T); None without a critic."""
    returns: torch.Tensor | None = None
    """The critic's targets, (B, T); None without a critic."""
    rows: Sequence[Row] = ()

    def __len__(self) -> int:
        return len(self.new_logprobs)

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """Log of ``ratio``, (B, T), 0 outside the mask."""
        return self._gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @cached_property
    def ratio(self) -> torch.Tensor:
        """Probability of each token under the updated policy over the sampling policy, (B, T), 1 outside the mask."""
        return torch.exp(self.log_ratio)

    @cached_property
    def response_log_ratio(self) -> torch.Tensor:
        """Log of each response's probability ratio, (B, 1): the sum over its tokens."""
        return self._gap.sum(dim=1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @cached_property
    def mean_log_ratio(self) -> torch.Tensor:
        """Mean of a response's log-ratios, (B, 1): the log of the geometric mean of its tokens' ratios."""
        return (self._gap.sum(dim=1, keepdim=True) / self.lengths).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Learned tokens of each response, at least 1, (B, 1)."""
        return self.mask.sum(dim=1, keepdim=True).clamp(min=1)

    @cached_property
    def _gap(self) -> torch.Tensor:
        """Differences of log-probabilities without a limit, (B, T), 0 outside the mask."""
        return torch.where(self.mask, self.new_logprobs - self.logprobs, self.new_logprobs.new_zeros(()))

    @property
    def position(self) -> torch.Tensor:
        """Number of each learned token within its response, 0 for the first, (B, T)."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Group:
    """The n responses to one prompt, for an advantage that returns a number per response, (n,), or per token, (n, T).

    Episodes whose environment failed are not among them.
    """

    scores: torch.Tensor
    """Scores after penalties; with ``kl_in: reward`` minus the KL penalty, (n,)."""
    lengths: torch.Tensor
    """Tokens that the policy sampled, (n,)."""
    kl: torch.Tensor
    """KL to the reference, summed over each response, in nats, (n,)."""
    finished: torch.Tensor
    """True if the response ended by itself, (n,)."""
    mask: torch.Tensor
    """True on sampled tokens, (n, T)."""
    parts: Mapping[str, torch.Tensor]
    """Components of the scores by name, NaN for a response without one, (n,) each."""
    rows: Sequence[Row] = ()
    """The prompt's row."""

    def __len__(self) -> int:
        return len(self.scores)
