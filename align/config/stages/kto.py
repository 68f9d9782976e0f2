"""Settings of the stage ``kto``: single answers marked as desirable or not. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.preference import ReferenceFields
from align.store.artifacts import Kind


class KtoConfig(ReferenceFields):
    """Feedback on single answers, thumbs up or down; pairs are split. ``batch_size`` counts answers."""

    data: stage_input(Kind.UNPAIRED, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with labeled answers, or with pairs, each of which becomes two answers."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """``kto`` subtracts a reference point, the drift on answers to other prompts of the micro-batch;
    ``apo_zero_unpaired`` (2408.06266) has none."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of desirable answers; if they are few, raise it until their total weight is 1 to 4/3 of the others'."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of undesirable answers."""

    trainer_class: ClassVar[str] = "trl.trainer.kto_config:KTOConfig"
    owned_options: ClassVar[dict[str, str]] = ReferenceFields.owned_options | {
        "loss_type": "set 'loss' beside 'trainer'"
    }

    @property
    def rows_add_up(self) -> bool:
        """False for ``kto``, whose reference point is the micro-batch's."""
        return self.loss != "kto"

    @property
    def sides(self) -> int:
        """An answer has one sequence."""
        return 1

    @model_validator(mode="after")
    def _a_reference_point_needs_others(self) -> Self:
        if self.loss == "kto" and self.micro_batch < 2:
            raise ValueError(
                "kto's reference point comes from the micro-batch's other answers; set micro_batch_size to 2 or "
                "more, 8 is better, or take `loss: apo_zero_unpaired`."
            )
        return self
