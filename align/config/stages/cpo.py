"""Settings of the stage ``cpo``: contrastive preference optimization. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.preference import ExperimentalFields
from align.store.artifacts import Kind


class CpoConfig(ExperimentalFields):
    """No reference, so no scoring before training. ``batch_size`` counts pairs. Experimental in trl."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; best if sampled from ``policy`` itself."""
    beta: float = Field(0.1, gt=0)
    """Scale of the compared log-probabilities. Those of ``simpo`` and ``alphapo`` are means over tokens, so use 2 or
    more."""
    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    """``sigmoid`` is CPO; ``hinge`` SLiC (2305.10425); ``ipo`` 2310.12036; ``simpo`` 2405.14734, per token and with a
    target margin; ``alphapo`` 2501.03884, SimPO with rewards bent by ``alpha``. See stage ``simpo`` for plain SimPO."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of mislabeled pairs; not for ``hinge`` and ``ipo``."""
    cpo_alpha: float | None = Field(None, ge=0)
    """Weight of an SFT loss on the chosen answers, which keeps them likely; by default 1, and 0 for ``simpo`` and
    ``alphapo``, as in their papers."""
    simpo_gamma: float | None = Field(None, ge=0)
    """Target margin of ``simpo`` and ``alphapo`` in units of the reward, 0.5 by default; half of beta is usual."""
    alpha: float = 0.0
    """Curvature of ``alphapo``'s reward; 0 is SimPO, 0.25 the paper's choice for most models."""

    trainer_class: ClassVar[str] = "trl.experimental.cpo.cpo_config:CPOConfig"
    owned_options: ClassVar[dict[str, str]] = ExperimentalFields.owned_options | {
        "loss_type": "set 'loss' beside 'trainer'"
    }

    @property
    def sft_weight(self) -> float:
        """``cpo_alpha``, or its default."""
        if self.cpo_alpha is not None:
            return self.cpo_alpha
        return 0.0 if self.loss in ("simpo", "alphapo") else 1.0

    @property
    def rows_add_up(self) -> bool:
        """False: the SFT loss is the mean over a micro-batch's tokens."""
        return False

    @model_validator(mode="after")
    def _options_fit_the_loss(self) -> Self:
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(
                f"label_smoothing has no effect with {self.loss}; take `loss: sigmoid` or `simpo`, or drop it."
            )
        if self.simpo_gamma is not None and self.loss not in ("simpo", "alphapo"):
            raise ValueError(f"simpo_gamma has no effect with {self.loss}; take `loss: simpo`, or drop it.")
        if self.alpha and self.loss != "alphapo":
            raise ValueError(f"alpha has no effect with {self.loss}; take `loss: alphapo`, or drop it.")
        if self.loss == "alphapo" and self.cpo_alpha:
            raise ValueError("alphapo has no SFT loss (cpo_alpha); drop cpo_alpha.")
        return self
