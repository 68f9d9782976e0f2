"""Stage ``online_dpo``: DPO on pairs of the policy's own responses, scored update by update (arXiv 2402.04792)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import RolloutFields
from align.pipeline.context import StageContext


class OnlineDpoConfig(RolloutFields):
    """Of the responses to a prompt, the best and the worst by the score are a pair; those that tie teach nothing.

    The reference is the policy as it comes in. trl's trainer of the same name is experimental; this one is not trl's.
    """

    kind: ClassVar[str] = "online_dpo"

    samples_per_prompt: int = Field(2, ge=2)
    """Responses to each prompt; of more than two, the best and the worst pair up and the rest is not learned from."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """As in stage ``dpo``: ``sigmoid`` is DPO; ``ipo`` (2310.12036) aims at a fixed margin per token; ``hinge`` is
    SLiC's (2305.10425)."""
    beta: float = Field(0.1, gt=0)
    """How much a nat of drift from the reference costs; smaller drifts further. For ``ipo`` it is that paper's tau."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For ``sigmoid``: the share of pairs that the scorer is believed to get wrong."""

    @property
    def kept_per_prompt(self) -> int:
        """The best and the worst."""
        return 2

    @property
    def micro_batch(self) -> int:
        """Responses in memory at once, an even number."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max((size for size in range(2, 17, 2) if self.per_step % size == 0), default=2)

    @property
    def together(self) -> int:
        """The two of a pair."""
        return 2

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        if self.micro_batch % 2:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch}; a pair is learned from together: take an even one."
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for `loss: sigmoid`; loss is {self.loss}.")
        return self


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return what ``ppo`` does, with accuracy and margin of the pairs; resumes."""
    from align.stages.critic_free import train

    return train(context)
