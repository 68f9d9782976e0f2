"""Settings of the stage ``orpo``: fine-tuning and preferences in one loss. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from align.config.base import stage_input
from align.config.stages.preference import ExperimentalFields
from align.store.artifacts import Kind


class OrpoConfig(ExperimentalFields):
    """Needs no reference and no SFT stage before it. ``batch_size`` counts pairs. Experimental in trl."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; its chosen answers should be worth imitating."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds-ratio term, relative to the SFT loss; the paper's lambda."""
    prompt_loss: bool = True
    """Include the prompts in the chosen answers' loss, as the paper's code and trl do."""

    trainer_class: ClassVar[str] = "trl.experimental.orpo.orpo_config:ORPOConfig"

    @property
    def rows_add_up(self) -> bool:
        """False: the SFT loss is the mean over a micro-batch's tokens."""
        return False
