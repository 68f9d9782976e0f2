"""Settings of the stage ``merge``: one checkpoint of several. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.store.artifacts import GENERATORS, Kind

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "warp"]


NEEDS_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "warp")


DENSITY = 0.5


DENSE = ("ties", "dare_linear", "dare_ties")


class MergeConfig(Config):
    """``policies`` that write, or ``rewards`` that score (WARM, 2401.12187): trained from one base, and from nothing
    is learned here. ``base`` + ``scale`` * what the method makes of the ways from the base to each of them.
    """

    policies: list[stage_input(*GENERATORS)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Stages whose checkpoints are merged; the first one's tokenizer and settings are the result's."""
    rewards: list[stage_input(Kind.REWARD)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Reward models to merge instead: one that is harder to fool, at the cost of one."""
    base: stage_input(*GENERATORS, Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint all of them were trained from; all methods but linear and slerp need it."""
    method: Method = "linear"
    """``linear`` averages (soups, 2203.05482); ``slerp`` goes along the great circle between two; ``task_arithmetic``
    adds the ways from the base (2212.04089); ``ties`` (2306.01708) and ``dare`` (2311.03099) thin these out before;
    ``warp`` (2406.16768) merges their directions and keeps their length."""
    weights: list[float] | None = Field(None, min_length=1)
    """One for each checkpoint, in their order. ``linear`` and ``slerp`` take them as shares. By default all count the
    same: 1 / n each, and 1 each for ``ties`` and ``dare_ties``, which average by themselves."""
    density: float = Field(DENSITY, gt=0, le=1)
    """``ties``, ``dare``: share of each way's entries that is kept, the largest or random ones."""
    scale: float = Field(1.0, gt=0, le=3)
    """With a base, how much of the merged way is gone: below 1 forgets less (WiSE-FT 2109.01903; WARP's eta)."""

    @model_validator(mode="after")
    def _one_kind_of_models(self) -> Self:
        if bool(self.policies) == bool(self.rewards):
            found = "both" if self.policies else "neither"
            raise ValueError(f"name either policies or rewards, the checkpoints to merge; found {found}.")
        models = self.policies or self.rewards
        if len(set(models)) < len(models):
            raise ValueError(f"the same stage stands twice in {', '.join(models)}; give it a weight instead.")
        alone = self.method == "linear" and self.base is not None
        if len(models) < 2 and not alone:
            raise ValueError(
                "there is one checkpoint, and merging takes two or more; a single one goes with `method: linear`, a "
                "base and a scale."
            )
        if self.method == "slerp" and len(models) != 2:
            raise ValueError(f"slerp goes between two checkpoints, and there are {len(models)}; take warp for more.")
        return self

    @model_validator(mode="after")
    def _settings_mean_something(self) -> Self:
        if self.base is None and self.method in NEEDS_BASE:
            raise ValueError(f"{self.method} merges the ways from a base; name it: `base: sft`.")
        # Not model_fields_set: a stage's process is given its resolved config, in which every field is set.
        if self.base is None and self.scale != 1:
            raise ValueError("scale is how far to go from the base, and there is none; name it: `base: sft`.")
        if self.density != DENSITY and self.method not in DENSE:
            raise ValueError(f"density is read by {', '.join(DENSE)} only; leave it out for {self.method}.")
        if self.base in (self.policies or self.rewards):
            raise ValueError(f"'{self.base}' is the base of itself; take it out of the checkpoints or name another.")
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        if self.weights is None:
            return self
        models = self.policies or self.rewards
        if self.method == "warp":
            raise ValueError("warp gives every checkpoint the same share; leave weights out.")
        if len(self.weights) != len(models):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(models)} checkpoints.")
        if self.method != "task_arithmetic" and any(weight < 0 for weight in self.weights):
            raise ValueError(f"weights {self.weights}: below 0 (unlearning) is for task_arithmetic only.")
        if self.method in ("linear", "slerp") and not sum(self.weights) > 0:
            raise ValueError(f"weights {self.weights} are shares; at least one must be above 0.")
        return self

    def makes(self) -> Kind:
        """What was put in comes out."""
        return Kind.REWARD if self.rewards else Kind.POLICY

    def coefficients(self, count: int) -> list[float]:
        """``weights`` with their default filled in; shares where the method takes shares."""
        if self.weights is None:
            return [1.0 if self.method in ("ties", "dare_ties") else 1 / count] * count
        total = sum(self.weights) if self.method in ("linear", "slerp") else 1.0
        return [weight / total for weight in self.weights]
