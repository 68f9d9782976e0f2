"""Settings of the stages that learn from the best of several responses: rejection and online_dpo. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import RolloutFields
from align.config.stages.training import PeakRates


class RejectionConfig(RolloutFields):
    """An update is a round: sample, select the best responses to each prompt, learn them as in SFT, and sample again.

    A round has ``rollout_batch / samples_per_prompt`` prompts and ``num_epochs x num_mini_batches`` optimizer steps.
    The loss has no reference: the policy learns only from its own responses. The loss is SFT's, at temperature 1, so
    with a lower sampling ``temperature`` the policy's entropy falls with every round.
    """

    rates: ClassVar[PeakRates] = PeakRates(5e-4, 1e-4)

    updates: int = Field(3, ge=1)
    """Rounds."""
    rollout_batch: int = Field(512, ge=1)
    """Responses per round."""
    samples_per_prompt: int = Field(8, ge=1)
    """Responses to each prompt to select from. More gives better ones, with diminishing returns."""
    num_mini_batches: int = Field(4, ge=1)
    """Optimizer steps per pass over the selected responses."""
    best: int = Field(1, ge=1)
    """Best responses to each prompt to learn from. Duplicates count once."""
    threshold: float | list[float] | None = None
    """Minimum score, penalties subtracted, to learn from. A list has a value for each round; further rounds use its
    last value."""
    truncated: Literal["learn", "mask"] = "mask"
    """``mask`` never selects a response cut at ``max_tokens``. ``learn`` may, which teaches the policy not to stop."""

    @property
    def kept_per_prompt(self) -> int:
        """``best``."""
        return self.best

    def threshold_of(self, update: int) -> float | None:
        """Return the minimum score in a round; rounds after a list's end use its last value."""
        if not isinstance(self.threshold, list):
            return self.threshold
        return self.threshold[min(update, len(self.threshold) - 1)]

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if self.best > self.samples_per_prompt:
            raise ValueError(f"best {self.best} is more than samples_per_prompt {self.samples_per_prompt}.")
        if self.samples_per_prompt == 1 and self.threshold is None:
            raise ValueError("samples_per_prompt is 1 without a threshold: nothing is selected. Set one of them.")
        if isinstance(self.threshold, list) and not 1 <= len(self.threshold) <= self.updates:
            raise ValueError(f"threshold has {len(self.threshold)} values for {self.updates} rounds (updates).")
        return self


class OnlineDpoConfig(RolloutFields):
    """The best and the worst response to a prompt, by score, are a pair. Pairs with equal scores are not used.

    The reference is the policy as it comes in. trl has an experimental trainer of this name; this one is not trl's.
    """

    samples_per_prompt: int = Field(2, ge=2)
    """Responses to each prompt. Of more than two, only the best and the worst are learned from."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """As for stage ``dpo``: ``sigmoid`` is DPO; ``ipo`` (2310.12036) has a target margin per token; ``hinge`` is SLiC's
    (2305.10425)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference; smaller values drift further. For ``ipo`` it is that paper's tau."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For ``sigmoid``: assumed share of pairs that the scorer ranks wrongly."""

    @property
    def kept_per_prompt(self) -> int:
        """The best and the worst."""
        return 2

    @property
    def micro_batch(self) -> int:
        """Responses in memory at once, an even number, unless memory runs out."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        # An even number keeps both responses of a pair in one micro-batch.
        return max((size for size in range(2, 17, 2) if self.responses_per_step % size == 0), default=2)

    @property
    def indivisible_responses(self) -> int:
        """The two of a pair."""
        return 2

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.micro_batch % 2:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch}; the two responses of a pair share a micro-batch: use an even "
                "number."
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for `loss: sigmoid`; loss is {self.loss}.")
        return self
