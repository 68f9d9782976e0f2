"""Settings of the stage ``reward``: a reward model on pairs, scores or marked steps. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.config.options import OWNED
from align.config.own_function import OwnFunction, own_or
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields
from align.store.artifacts import GENERATORS, Kind

PAIR_FIELDS = {"margin": 0.0, "center_rewards": 0.01}
"""Fields that only pairs use, with their defaults."""


class StepsConfig(Config):
    """Steps of an answer: their separator, and the answer's score from theirs."""

    separator: str = Field("\n\n", min_length=1)
    """Text between two steps; the scored policy must write it."""
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    """Aggregate of the steps' probabilities of being right; ``min`` because a chain is as good as its weakest step."""


class RewardConfig(TrainingFields):
    """The score is read at an answer's last token. ``batch_size`` counts pairs, or answers for other objectives."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint gets a score head instead of its vocabulary head; usually the SFT stage."""
    data: stage_input(Kind.PREFERENCES, Kind.INSTRUCTIONS, Kind.UNPAIRED)  # type: ignore[valid-type]
    """Stage with the pairs; for regression with scored answers, for process with unpaired rows that have steps."""
    thoughts: Literal["read", "drop"] = "read"
    """Thoughts of answers (``<think>``): read them with the answer, or remove them, for scores of the answer only."""
    objective: Literal["pairs", "regression", "process"] = "pairs"
    """``pairs``: which of two answers is better (Bradley-Terry). ``regression``: the answer's score itself.
    ``process``: whether each step is right (arXiv 2305.20050)."""
    loss: own_or(Literal["bradley_terry"]) = "bradley_terry"  # type: ignore[valid-type]
    """Loss of pairs. ``bradley_terry``, or an own function of ``align.methods.records.PairScores``:
    ``"my_methods:my_pairwise"``, or ``{function: ..., OPTION: ...}`` (docs/own_methods.md)."""
    margin: float = Field(0.0, ge=0)
    """Margin of the chosen answer, per unit of difference between the pair's scores (2307.09288, eq. 2); needs scored
    pairs. In most data good and bad answers differ by about 1, so 1 is a strong setting."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels; keeps scores from growing on contradictory pairs."""
    score_loss: Literal["mse", "bce"] = "mse"
    """Loss of regression: squared error of scores normalized to mean 0 and variance 1, or cross-entropy of scores (or
    labels) in [0, 1], with the model's score as log-odds."""
    steps: StepsConfig = StepsConfig()
    """Settings of process."""
    head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of the score head; by default ``learning_rate``, or a tenth of it with adapters."""
    center_rewards: float = Field(0.01, ge=0)
    """Pairs: weight of the squared sum of a pair's scores (2312.09244, eq. 2), which keeps scores near 0."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})
    keyed_when_set: ClassVar[frozenset[str]] = TrainingFields.keyed_when_set | {"loss"}
    has_vocabulary: ClassVar[bool] = False
    trainer_class: ClassVar[str] = "trl.trainer.reward_config:RewardConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        "center_rewards_coefficient": "set 'center_rewards' next to 'trainer'"
    }

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identity of an own loss, for the stage's key."""
        return {"loss": self.loss.identity("loss")} if isinstance(self.loss, OwnFunction) else {}

    @property
    def rows_add_up(self) -> bool:
        """False for process, whose loss is the mean over a micro-batch's steps."""
        return self.objective != "process"

    @property
    def sides(self) -> int:
        """A pair has two sequences."""
        return 2 if self.objective == "pairs" else 1

    @property
    def head_rate(self) -> float:
        """``head_learning_rate``, or its default."""
        if self.head_learning_rate is not None:
            return self.head_learning_rate
        return self.peak_rate * self.tuning.head_share

    @property
    def loss_of_numbers(self) -> Literal["mse", "bce"]:
        """The loss of regression and process."""
        return "bce" if self.objective == "process" else self.score_loss

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if not isinstance(self.loss, OwnFunction):
            return self
        if self.objective != "pairs":
            raise ValueError(f"loss is for pairs, and objective is {self.objective}; leave it out.")
        if self.label_smoothing:
            raise ValueError("label_smoothing is of bradley_terry; give the own loss an option of its name instead.")
        return self

    @model_validator(mode="after")
    def _check_objective_fields(self) -> Self:
        if self.objective != "pairs":
            for name, default in PAIR_FIELDS.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is only for pairs, and objective is {self.objective}; leave it out.")
        if self.objective == "process" and self.evaluate is not None:
            raise ValueError("evaluate scores whole answers, and `objective: process` scores steps; leave it out.")
        if self.objective != "regression" and self.score_loss != "mse":
            raise ValueError(f"score_loss is for regression, and objective is {self.objective}; leave it out.")
        if self.objective != "process" and self.steps != StepsConfig():
            raise ValueError(f"steps are for `objective: process`, and objective is {self.objective}; leave them out.")
        if self.label_smoothing and self.objective == "regression" and self.score_loss == "mse":
            raise ValueError("label_smoothing is for labels, and `score_loss: mse` predicts numbers; leave it out.")
        return self
