"""Settings of the stage ``merge``: one checkpoint of several. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.store.artifacts import GENERATORS, Kind

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "warp"]
NEEDS_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "warp")
DENSITY = 0.5
"""Default of ``density``."""
SPARSE = ("ties", "dare_linear", "dare_ties")
"""Methods that use ``density``."""


class MergeConfig(Config):
    """Merge ``policies``, or reward models (WARM, 2401.12187), that were trained from one base. Nothing is trained.

    The result is ``base`` + ``scale`` * merge of the task vectors (checkpoint - base).
    """

    policies: list[stage_input(*GENERATORS)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Stages whose checkpoints are merged; the result has the first one's tokenizer and settings."""
    rewards: list[stage_input(Kind.REWARD)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Reward models to merge instead; the result is harder to hack, at the cost of one model."""
    base: stage_input(*GENERATORS, Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint all were trained from; every method but linear and slerp needs it."""
    method: Method = "linear"
    """``linear`` averages (soups, 2203.05482); ``slerp`` interpolates two on the great circle; ``task_arithmetic`` adds
    task vectors (2212.04089); ``ties`` (2306.01708) and ``dare`` (2311.03099) make these sparse before; ``warp``
    (2406.16768) merges their directions and keeps their length."""
    weights: list[float] | None = Field(None, min_length=1)
    """One weight per checkpoint; shares for ``linear`` and ``slerp``. By default 1 / n each, and 1 each for ``ties``
    and ``dare_ties``, which average themselves."""
    density: float = Field(DENSITY, gt=0, le=1)
    """``ties``, ``dare``: share of a task vector's entries to keep, the largest or random ones."""
    scale: float = Field(1.0, gt=0, le=3)
    """Factor of the merged task vector; below 1 forgets less (WiSE-FT 2109.01903; WARP's eta)."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if bool(self.policies) == bool(self.rewards):
            present = "both" if self.policies else "neither"
            raise ValueError(f"name either policies or rewards, the checkpoints to merge; found {present}.")
        models = self.policies or self.rewards
        if len(set(models)) < len(models):
            raise ValueError(f"the same stage is listed twice in {', '.join(models)}; give it a weight instead.")
        allows_single = self.method == "linear" and self.base is not None
        if len(models) < 2 and not allows_single:
            raise ValueError(
                "there is one checkpoint, and merging needs two or more; a single one needs `method: linear`, a "
                "base and a scale."
            )
        if self.method == "slerp" and len(models) != 2:
            raise ValueError(f"slerp interpolates two checkpoints, and there are {len(models)}; take warp for more.")
        return self

    @model_validator(mode="after")
    def _check_settings_used(self) -> Self:
        if self.base is None and self.method in NEEDS_BASE:
            raise ValueError(f"{self.method} merges task vectors from a base; name it: `base: sft`.")
        # not model_fields_set: a stage's process gets its config with every default written out
        if self.base is None and self.scale != 1:
            raise ValueError(
                "scale is the factor of the change from the base, and there is none; name it: `base: sft`."
            )
        if self.density != DENSITY and self.method not in SPARSE:
            raise ValueError(f"density is used by {', '.join(SPARSE)} only; leave it out for {self.method}.")
        if self.base in (self.policies or self.rewards):
            raise ValueError(
                f"'{self.base}' is the base and a checkpoint to merge; remove it from the checkpoints, or name "
                "another base."
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.weights is None:
            return self
        models = self.policies or self.rewards
        if self.method == "warp":
            raise ValueError("warp weights every checkpoint equally; leave weights out.")
        if len(self.weights) != len(models):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(models)} checkpoints.")
        if self.method != "task_arithmetic" and any(weight < 0 for weight in self.weights):
            raise ValueError(f"weights {self.weights}: below 0 (unlearning) is for task_arithmetic only.")
        if self.method in ("linear", "slerp") and not sum(self.weights) > 0:
            raise ValueError(f"weights {self.weights} are shares; at least one must be above 0.")
        return self

    def makes(self) -> Kind:
        """Return the kind of the merged checkpoints."""
        return Kind.REWARD if self.rewards else Kind.POLICY

    def coefficients(self, count: int) -> list[float]:
        """Return the weights of ``count`` checkpoints, defaults included, normalized if the method uses shares."""
        if self.weights is None:
            return [1.0 if self.method in ("ties", "dare_ties") else 1 / count] * count
        # Shares are normalized; weights of task vectors are factors and stay as they are.
        total = sum(self.weights) if self.method in ("linear", "slerp") else 1.0
        return [weight / total for weight in self.weights]
