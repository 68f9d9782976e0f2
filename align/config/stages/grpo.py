"""Settings of stage ``grpo``, and the defaults of its loss variants. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import DriftFields

GroupLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
Scale = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence"]


@dataclass(frozen=True)
class Preset:
    """Parts of a loss variant. The clip ranges and ``scale_rewards`` are defaults that a field of that name replaces.

    ``ratio``: one probability ratio per token, or one per response (the geometric mean over its tokens).
    ``aggregation``: as PPO's ``loss_aggregation``. ``clips``: clip the surrogate (PPO), or only cap the ratio's weight.
    """

    aggregation: Literal["token", "sequence", "constant"]
    scale_rewards: Scale = "group"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    ratio: Ratio = "token"
    clips: bool = True


PRESETS: dict[GroupLoss, Preset] = {
    "grpo": Preset("sequence"),
    "bnpo": Preset("token"),
    "dr_grpo": Preset("constant", scale_rewards="none"),
    "dapo": Preset("token", clip_range_high=0.28),
    "gspo": Preset("sequence", clip_range=3e-4, clip_range_high=4e-4, ratio="sequence"),
    "cispo": Preset("token", clip_range_high=4.0, clips=False),
}
"""Loss variant -> its parts. Sources: ``GrpoConfig.loss``."""


class GrpoConfig(DriftFields):
    """``loss`` selects the variant. Fields that are not set follow its paper (docs/methods.md).

    The other fields are the fields of ``ppo`` without its critic. Memory: the policy; with full tuning also its frozen
    copy.
    """

    default_loss_estimator: ClassVar[Literal["k2", "k3"]] = "k3"

    loss: GroupLoss = "grpo"
    """``grpo``: every response weighs the same (2402.03300). ``bnpo``: every token of a step does. ``dr_grpo``: token
    sums over ``max_tokens``, scores only centered (2503.20783). ``dapo``: tokens weigh the same, and the ratio may rise
    to 1.28 (2503.14476). ``gspo``: one ratio per response (2507.18071). ``cispo``: the ratio is a capped weight
    (2506.13585)."""
    samples_per_prompt: int = Field(8, ge=2)
    """Responses to each prompt: the group, whose mean is the baseline."""
    kl_coef: float = Field(0.04, ge=0)
    """Weight of the KL to the reference. The papers on dr_grpo, dapo, gspo and cispo use 0, with checkers as scores."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Apply the KL penalty as a term of the loss, or to the score of a response before it is compared to its group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """``k3`` (GRPO's, the default) or ``k2`` in the loss; ``k1`` in the reward."""
    scale_rewards: Scale | None = None
    """Divide centered scores by their standard deviation in the ``group``, in the ``batch``, or not (``none``).
    ``dr_grpo``: none, the others: group."""
    clip_range: float | None = Field(None, gt=0, lt=1)
    """Clip range of the ratio below 1. ``gspo``: 0.0003, the others: 0.2. Not for ``cispo``, which has no lower one."""
    clip_range_high: float | None = Field(None, gt=0)
    """Clip range of the ratio above 1. ``dapo``: 0.28, ``gspo``: 0.0004, ``cispo`` (which caps at 1 + this): 4, else
    ``clip_range``."""
    zero_variance: Literal["keep", "resample"] = "keep"
    """Groups whose responses all score the same have no gradient: keep and count them, or sample other prompts instead
    (DAPO's dynamic sampling)."""
    resample_rounds: int = Field(3, ge=1)
    """Maximum rounds of resampling in an update."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before ``max_tokens`` over which a penalty rises (DAPO); 0 for none. ``truncated: mask`` filters."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Penalty of a response of ``max_tokens`` tokens."""

    @property
    def preset(self) -> Preset:
        """Parts of the loss variant."""
        return PRESETS[self.loss]

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1. If only ``clip_range`` is set, it applies to both."""
        low = self.preset.clip_range if self.clip_range is None else self.clip_range
        high = self.clip_range_high
        if high is None and (self.clip_range is None or not self.preset.clips):
            high = self.preset.clip_range_high
        return low, low if high is None else high

    @property
    def scale(self) -> Scale:
        """``scale_rewards``, or the default of the loss variant."""
        return self.scale_rewards or self.preset.scale_rewards

    @model_validator(mode="after")
    def _check_resampling_and_penalty(self) -> Self:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} is longer than max_tokens {self.max_tokens}.")
        if self.zero_variance == "keep" and self.changed("resample_rounds"):
            raise ValueError("resample_rounds is set, but zero_variance is keep; set `zero_variance: resample`.")
        if self.loss == "cispo" and self.clip_range is not None:
            raise ValueError("clip_range is set, but `loss: cispo` only caps the ratio; set clip_range_high instead.")
        if self.max_staleness and self.zero_variance == "resample":
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but `zero_variance: resample` samples more for the current "
                "update; set `zero_variance: keep`, or `max_staleness: 0`."
            )
        return self
