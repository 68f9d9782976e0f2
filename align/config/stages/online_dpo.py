"""Settings of stage ``online_dpo``. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import RolloutFields


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
        """Responses in memory at once, an even number."""
        if self.micro_batch_size is not None:
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
