"""Settings of the stage ``orpo``: fine-tuning and preferences in one loss. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.config.stages.preference import PreferenceFields, check_experimental, checked_experimental_options
from align.store.artifacts import Kind


class OrpoConfig(PreferenceFields):
    """Needs no reference and no SFT stage before it. ``batch_size`` counts pairs. Experimental in trl."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; its chosen answers should be worth imitating."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds-ratio term, relative to the SFT loss; the paper's lambda."""
    prompt_loss: bool = True
    """Include the prompts in the chosen answers' loss, as the paper's code and trl do."""

    @property
    def rows_add_up(self) -> bool:
        """False: the SFT loss is the mean over a micro-batch's tokens."""
        return False

    @model_validator(mode="after")
    def _trl_has_it(self) -> OrpoConfig:
        check_experimental("orpo")
        return self

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_experimental_options("orpo", options, {"beta"})
