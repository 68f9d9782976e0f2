"""Odds-ratio preference optimization (arXiv 2403.07691): supervised fine-tuning and preference learning in one loss.

Experimental in trl, which may move or drop its ORPOTrainer.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.pipeline.context import StageContext
from align.stages.preference import (
    PreferenceFields,
    check_experimental,
    checked_experimental_options,
    train_without_reference,
)
from align.store.artifacts import Kind


class OrpoConfig(PreferenceFields):
    """No reference and no SFT stage before it is needed; ``batch_size`` counts pairs. Experimental in trl."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; its chosen answers should be worth imitating."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the chosen answers' loss; the paper's lambda."""
    prompt_loss: bool = True
    """Whether the chosen answers' loss takes in their prompts, as the paper's code and trl do; off, answers alone."""

    @property
    def rows_add_up(self) -> bool:
        """Not the chosen answers' part, which is the mean over a micro-batch's tokens."""
        return False

    @model_validator(mode="after")
    def _trl_has_it(self) -> OrpoConfig:
        check_experimental("orpo")
        return self

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_experimental_options("orpo", options, {"beta"})


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a trl without ORPOTrainer.
    """
    from align.training.orpo_trainer import Arguments, PreparedORPO

    config: OrpoConfig = context.config
    make = functools.partial(PreparedORPO, prompt_too=config.prompt_loss)
    return train_without_reference(context, make, Arguments, beta=config.beta)
