"""Settings of the stages that learn from preferences: dpo, kto, orpo, cpo and simpo. Torch-free."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.options import OWNED
from align.config.own_function import OwnFunction, own_or
from align.config.stages.lint import LintSettings
from align.config.stages.training import PeakRates, TrainingFields
from align.store.artifacts import GENERATORS, Kind


class PreferenceFields(TrainingFields):
    """Fields of every stage on preferences."""

    rates: ClassVar[PeakRates] = PeakRates(3e-4, 5e-6)

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained; usually the SFT stage."""
    thoughts: Literal["train", "read", "drop"] = "train"
    """Thoughts of answers (``<think>``): learn them, show but do not learn them, or remove them (docs/thinking.md)."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @property
    def sides(self) -> int:
        """A pair has two sequences."""
        return 2


class ReferenceFields(PreferenceFields):
    """Fields of the stages that compare the policy with a reference."""

    refers: ClassVar[bool] = True
    owned_options: ClassVar[dict[str, str]] = OWNED | dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"),
        "the reference is always scored once, before training",
    )

    reference: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint is the reference; by default the policy before training. It scores every row once."""
    beta: float = Field(0.1, gt=0)
    """Penalty per nat of drift from the reference; smaller values drift further. For ``ipo`` it is the paper's tau."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule from beta to ``final_beta`` over the steps."""
    final_beta: float | None = Field(None, gt=0)
    """beta of the last step, also used for the final evaluation; only with a schedule."""

    @model_validator(mode="after")
    def _check_schedule_end(self) -> Self:
        if (self.beta_schedule == "constant") != (self.final_beta is None):
            raise ValueError(
                f"beta_schedule is {self.beta_schedule} and final_beta {self.final_beta}: a schedule needs the beta "
                "it ends at, and a constant beta has none. Set both, as in `beta_schedule: linear, final_beta: 0.02`, "
                "or neither."
            )
        return self


class ExperimentalFields(PreferenceFields):
    """Fields of the stages whose trainer is experimental in trl, which may move or drop it."""

    owned_options: ClassVar[dict[str, str]] = OWNED | {
        **dict.fromkeys(
            ("max_completion_length", "is_encoder_decoder", "padding_value"),
            "rows are tokenized before training",
        ),
        "generate_during_eval": "the 'evaluate' stage samples",
    }

    @model_validator(mode="after")
    def _check_trainer_exists(self) -> Self:
        module, _, name = self.trainer_class.partition(":")
        package, _, rest = module.partition(".")
        file = f"{rest.replace('.', '/')}.py"
        spec = importlib.util.find_spec(package)  # imports nothing
        if spec is None or spec.origin is None or not (Path(spec.origin).parent / file).is_file():
            raise ValueError(
                f"{package} {importlib.metadata.version(package)} has no {name} ({package}/{file}), which "
                "is experimental there and which this stage needs. Install trl 1.16, or take stage 'dpo'."
            )
        return self


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

PROVIDED = ("beta",)
"""Fields that an own loss gets if it has parameters of these names."""

DIFFERENCES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft"})
"""Losses of the difference between the two sides, in which terms that depend only on the prompt cancel."""

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that use ``label_smoothing``."""


class DpoConfig(ReferenceFields):
    """The reference is the policy before training, or another stage's checkpoint. ``batch_size`` counts pairs."""

    data: stage_input(Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the pairs; best if sampled from ``policy`` itself."""
    loss: own_or(Loss) = "sigmoid"  # type: ignore[valid-type]
    """``sigmoid`` is DPO; ``sigmoid_norm`` the same per token, against growing length; ``hinge`` is SLiC
    (2305.10425); ``ipo`` (2310.12036) aims at a fixed margin per token; ``robust`` (2403.00409) corrects for known
    label noise; ``exo_pair`` 2402.00856; ``nca_pair`` 2402.05369; ``bco_pair`` 2404.04656; ``sppo_hard`` 2405.00675;
    ``aot`` and ``aot_unpaired`` (2406.05882) compare sorted micro-batches; ``apo_zero`` and ``apo_down`` (2408.06266)
    are for chosen answers better, or worse, than the policy's; ``discopop`` 2406.08414; ``sft`` the chosen answers'
    loss. Or an own function of ``align.methods.records.PairLogprobs``: ``"my_methods:my_dpo"``, or
    ``{function: "my_methods:my_dpo", margin: 0.5}`` with its options (docs/own_methods.md)."""
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
        "loss_type": "set 'loss' or 'losses' next to 'trainer'",
        "loss_weights": "set 'losses' next to 'trainer'",
        "padding_free": "pairs are always padded",
    }

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identity of an own loss, for the stage's key."""
        return {"loss": self.loss.identity("loss", PROVIDED)} if isinstance(self.loss, OwnFunction) else {}

    @property
    def terms(self) -> dict[str, float]:
        """Every loss with its weight."""
        if isinstance(self.loss, OwnFunction):
            return {"own": 1.0} | ({"sft": self.sft_weight} if self.sft_weight else {})
        weights = {str(name): weight for name, weight in self.losses.items()} or {str(self.loss): 1.0}
        return weights | ({"sft": self.sft_weight} if self.sft_weight else {})

    @property
    def rows_add_up(self) -> bool:
        """False if pairs are compared with each other, or a loss is the mean over a micro-batch's tokens."""
        return not set(self.terms) & {"aot", "aot_unpaired", "sft"}

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        terms = self.terms
        if isinstance(self.loss, OwnFunction):
            for name in self.changed("label_smoothing", "discopop_tau"):
                raise ValueError(f"{name} is of the shipped losses; give the own loss an option of its name instead.")
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
    def _check_losses_fit_reference(self) -> Self:
        # Losses of single sides: what the reference says of a prompt does not cancel in them.
        # What an own loss compares is not known.
        beyond = sorted(set(self.terms) - DIFFERENCES - {"own"})
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
        "loss_type": "set 'loss' next to 'trainer'"
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
    def _check_reference_point(self) -> Self:
        if self.loss == "kto" and self.micro_batch < 2:
            raise ValueError(
                "kto's reference point comes from the micro-batch's other answers; set micro_batch_size to 2 or "
                "more, 8 is better, or take `loss: apo_zero_unpaired`."
            )
        return self


class OrpoConfig(ExperimentalFields):
    """Needs no reference and no SFT stage before it. ``batch_size`` counts pairs. Experimental in trl."""

    rates: ClassVar[PeakRates] = PeakRates(1e-3, 5e-5)

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
        "loss_type": "set 'loss' next to 'trainer'"
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
    def _check_loss_options(self) -> Self:
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


class SimpoConfig(CpoConfig):
    """Compares mean log-probabilities per token, so length does not help."""

    loss: Literal["simpo"] = "simpo"  # type: ignore[assignment]
    """Only ``simpo``; stage ``cpo`` has the other losses."""
    beta: float = Field(2.0, gt=0)
    """Scale of the compared mean log-probabilities; 2 to 10 in the paper."""
    simpo_gamma: float = Field(1.0, ge=0)  # type: ignore[assignment]
    """Target margin in units of the reward; 0.3 to 0.6 of beta in the paper."""
