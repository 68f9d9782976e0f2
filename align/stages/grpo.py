"""Stage ``grpo``: responses to a prompt are compared with each other, without a critic; GRPO and its variants."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import DriftFields
from align.pipeline.context import StageContext
from align.rl.critic_free.presets import GroupLoss, Scale


class GrpoConfig(DriftFields):
    """``loss`` names the variant; fields left out are as its paper has them (docs/methods.md).

    ``ppo``'s fields, without a critic's. Memory: the policy; with full tuning its frozen copy too.
    """

    kind: ClassVar[str] = "grpo"

    loss: GroupLoss = "grpo"
    """``grpo``: every response weighs the same (2402.03300); ``bnpo``: every token of a step does; ``dr_grpo``: token
    sums over ``max_tokens``, scores only centerd (2503.20783); ``dapo``: tokens weigh the same and the ratio may rise
    to 1.28 (2503.14476); ``gspo``: one ratio per response (2507.18071); ``cispo``: the ratio is a capped weight
    (2506.13585)."""
    samples_per_prompt: int = Field(8, ge=2)
    """Responses to each prompt, the group whose mean is the baseline."""
    kl_coef: float = Field(0.04, ge=0)
    """Weight of the drift from the reference. The papers on dr_grpo, dapo, gspo and cispo take 0, with checkers."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Whether drift is paid for by a term of the loss, or in the score of a response before it meets its group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """``k3`` (GRPO's, the default) or ``k2`` in the loss; ``k1`` in the reward."""
    scale_rewards: Scale | None = None
    """Divide centerd scores by their spread in the ``group``, in the ``batch``, or not (``none``); ``dr_grpo``: none,
    the others: group."""
    clip_range: float | None = Field(None, gt=0, lt=1)
    """A ratio earns nothing further below 1 than this; ``gspo``: 0.0003, the others: 0.2."""
    clip_range_high: float | None = Field(None, gt=0)
    """And nothing further above 1 than this; ``dapo``: 0.28, ``gspo``: 0.0004, ``cispo`` (its cap is 1 + this): 4, else
    ``clip_range``."""
    zero_variance: Literal["keep", "resample"] = "keep"
    """Groups whose responses all score the same teach nothing: count them, or put other prompts in their place
    (DAPO's dynamic sampling)."""
    resample_rounds: int = Field(3, ge=1)
    """Times that other prompts are sampled for them at most, in an update."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before ``max_tokens`` over which a penalty rises (DAPO); 0 for none. ``truncated: mask`` filters."""
    overlong_penalty: float = Field(1.0, ge=0)
    """What a response of ``max_tokens`` loses then."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} is longer than max_tokens {self.max_tokens}.")
        # By value, not by what was set: a stage's process reads the whole config back, defaults written out.
        if self.zero_variance == "keep" and self.resample_rounds != type(self).model_fields["resample_rounds"].default:
            raise ValueError("resample_rounds is set, but zero_variance is keep; set `zero_variance: resample`.")
        if self.max_staleness and self.zero_variance == "resample":
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but `zero_variance: resample` asks the engine for more of "
                "this very update; set `zero_variance: keep`, or `max_staleness: 0`."
            )
        return self


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return what ``ppo`` does, without a critic's metrics.

    Resumes from the last whole checkpoint. Raises ``UserError`` for prompts or models that do not fit, and
    ``ParityError`` when the engine and the trainer turn out to hold different models.
    """
    from align.stages.critic_free import train

    return train(context)
