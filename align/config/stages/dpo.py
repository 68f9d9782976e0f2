"""Settings of the stage ``dpo``: direct preference optimization and its losses. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.preference import ReferenceFields
from align.store.artifacts import Kind

Loss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
"""trl's loss types."""

DIFFERENCES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft"})
"""Losses of the difference between the two sides, in which terms that depend only on the prompt cancel."""

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that use ``label_smoothing``."""


class DpoConfig(ReferenceFields):
    """The reference is the policy before training, or another stage's checkpoint. ``batch_size`` counts pairs."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; best if sampled from ``policy`` itself."""
    loss: Loss = "sigmoid"
    """``sigmoid`` is DPO; ``sigmoid_norm`` the same per token, against growing length; ``hinge`` is SLiC
    (2305.10425); ``ipo`` (2310.12036) aims at a fixed margin per token; ``robust`` (2403.00409) corrects for known
    label noise; ``exo_pair`` 2402.00856; ``nca_pair`` 2402.05369; ``bco_pair`` 2404.04656; ``sppo_hard`` 2405.00675;
    ``aot`` and ``aot_unpaired`` (2406.05882) compare sorted micro-batches; ``apo_zero`` and ``apo_down`` (2408.06266)
    are for chosen answers better, or worse, than the policy's; ``discopop`` 2406.08414; ``sft`` the chosen answers'
    loss."""
    losses: dict[Loss, float] = Field(default_factory=dict)
    """Weighted sum of losses, instead of ``loss``: ``{sigmoid: 1.0, bco_pair: 0.3, sft: 0.2}``."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of mislabeled pairs, for ``robust`` and the AOT losses; ``exo_pair`` needs a small one, 1e-3."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an additional SFT loss on the chosen answers, which keeps them likely (2404.19733)."""
    reference_free: bool = False
    """Compare log-probabilities without a reference. Best per token, with ``sigmoid_norm``."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of tokens beyond the shorter side's length (LD-DPO, 2409.06411); lower values favor length less."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that measures drift from the reference (2309.16240)."""
    f_alpha_divergence_coef: float | None = None
    """alpha of ``alpha_divergence``, 0.5 by default; near 0 like the forward KL, near 1 like the reverse KL."""
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of ``discopop``'s blend."""
    use_weighting: bool = False
    """Weight pairs by their probability under the policy (WPO, 2406.11827); off-policy pairs count less."""

    trainer_class: ClassVar[str] = "trl.trainer.dpo_config:DPOConfig"
    owned_options: ClassVar[dict[str, str]] = ReferenceFields.owned_options | {
        "loss_type": "set 'loss' or 'losses' beside 'trainer'",
        "loss_weights": "set 'losses' beside 'trainer'",
        "padding_free": "pairs are always padded",
    }

    @property
    def terms(self) -> dict[str, float]:
        """Every loss with its weight."""
        named = {str(name): weight for name, weight in self.losses.items()} or {str(self.loss): 1.0}
        return named | ({"sft": self.sft_weight} if self.sft_weight else {})

    @property
    def rows_add_up(self) -> bool:
        """False if pairs are compared with each other, or a loss is the mean over a micro-batch's tokens."""
        return not set(self.terms) & {"aot", "aot_unpaired", "sft"}

    @model_validator(mode="after")
    def _losses_fit_together(self) -> Self:
        terms = self.terms
        if self.losses and self.loss != "sigmoid":
            raise ValueError("set either loss or losses: a single one with weight 1, or several by weight.")
        if any(weight <= 0 for weight in self.losses.values()):
            raise ValueError(f"losses has weights {self.losses}; each must be above 0. Leave unused losses out.")
        if self.sft_weight and (self.losses.get("sft") or self.loss == "sft"):
            raise ValueError("the SFT loss is set twice: as 'sft' and as sft_weight. Set one of them.")
        if self.label_smoothing and not set(terms) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing has no effect with {', '.join(terms)}; it is used by {', '.join(SMOOTHED)}. For "
                "pairs that may be mislabeled take `loss: robust`."
            )
        if "discopop" not in terms and self.changed("discopop_tau"):
            raise ValueError(f"discopop_tau has no effect with {', '.join(terms)}; it is used by discopop.")
        if "exo_pair" in terms and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing above 0; 0.001 in its paper.")
        if set(terms) & {"aot", "aot_unpaired"} and self.micro_batch < 2:
            raise ValueError(
                "aot compares the pairs of a micro-batch with one another; set micro_batch_size to 2 at least."
            )
        if self.use_weighting and set(terms) & {"aot", "aot_unpaired"}:
            raise ValueError(
                "use_weighting weights pairs, and aot sorts the two sides separately; leave out one of them."
            )
        return self

    @model_validator(mode="after")
    def _losses_fit_the_reference(self) -> Self:
        # Losses of single sides: what the reference says of a prompt does not cancel in them.
        beyond = sorted(set(self.terms) - DIFFERENCES)
        if self.f_divergence_type != "reverse_kl" and beyond:
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type} has no {', '.join(beyond)}: only what compares the two "
                f"sides has a form for it ({', '.join(sorted(DIFFERENCES))})."
            )
        if self.f_alpha_divergence_coef is not None and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is read with `f_divergence_type: alpha_divergence` only.")
        if self.reference_free and (self.reference is not None or self.f_divergence_type != "reverse_kl"):
            raise ValueError(
                "reference_free uses no reference: drop reference and f_divergence_type, or reference_free."
            )
        if self.reference_free and beyond:
            raise ValueError(
                f"reference_free has no {', '.join(beyond)}: they compare each side with the reference. Take one "
                f"of {', '.join(sorted(DIFFERENCES))}."
            )
        return self
