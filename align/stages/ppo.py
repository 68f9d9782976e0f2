"""Stage ``ppo``: the policy learns, from responses it samples itself, to earn higher scores; with a critic."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.launch import LaunchConfig
from align.config.stages.rl import DriftFields
from align.pipeline.context import StageContext


class PpoConfig(DriftFields):
    """One update samples ``rollout_batch`` responses, scores them and learns from them.

    Memory: LoRA needs the policy once, in float32 (the reference is the policy with its adapter off), and the reward
    model once, in ``precision`` (the critic is an adapter on it); full tuning needs both a second time, trained, with
    AdamW's state. `align plan --memory` says how much that is for the model at hand, and what other choices would cost.
    """

    kind: ClassVar[str] = "ppo"

    critic: Literal["reward", "policy", "head"] | None = None
    """What the critic starts from; by default the reward model where there is one. From ``policy`` it starts at 0.

    In memory: with LoRA ``reward`` and ``policy`` cost a second adapter and a head on weights that are there anyway;
    with full tuning a model of its own, 16 bytes a parameter with AdamW. ``head``, a linear head on the policy's own
    hidden states, costs one vector and no pass of its own.
    """
    critic_detach: bool = True
    """Whether ``critic: head`` leaves the policy's trunk alone; false lets its loss train the trunk too."""
    critic_learning_rate: float | None = Field(None, gt=0, le=1)
    """Of the critic; by default the policy's."""
    critic_head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Of the critic's value head; by default the critic's, and a tenth of it with LoRA."""
    critic_warmup_updates: int = Field(0, ge=0)
    """First updates in which only the critic learns."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of advantage estimation: 1 trusts the returns, 0 the critic."""
    truncation: Literal["bootstrap", "terminal"] = "terminal"
    """What follows a response cut at ``max_tokens``: what the critic expects of its rest, or nothing."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, keeping their mean."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the update's tokens."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """A token's probability ratio earns nothing further from 1 than this."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the ratio where the advantage is negative (arXiv 1912.09729), usually 3."""
    value_clip_range: float | None = Field(0.5, gt=0)
    """Values move no further than this per update, in units of reward; null switches it off."""
    vf_coef: float = Field(1.0, gt=0)
    """Weight of the value loss."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """Every token weighs the same, or every response does; ``constant`` divides token sums by ``max_tokens``."""

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """As for every stage that samples. DeepSpeed cannot let the policy rest: its optimizer steps every weight."""
        if self.critic_warmup_updates and launch.strategy == "deepspeed" and launch.known != 1:
            return (
                f"critic_warmup_updates {self.critic_warmup_updates} does not go with strategy deepspeed, whose "
                "optimizer decays and counts the policy's weights all the same; take fsdp2, or leave it out."
            )
        return super().processes_objection(launch)

    @property
    def critic_source(self) -> Literal["reward", "policy", "head"]:
        """``critic``, or its default."""
        return self.critic or ("reward" if self.reward else "policy")

    @model_validator(mode="after")
    def _critic_starts_from_something(self) -> Self:
        if self.critic == "reward" and not self.reward:
            raise ValueError("critic is reward, but no reward stage is named; set reward, or take `critic: policy`.")
        if self.whiten_rewards and self.rollout_batch < 8:
            raise ValueError(f"whiten_rewards needs a rollout_batch of at least 8; it is {self.rollout_batch}.")
        return self


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return scores, KL, lengths, speeds and times of the run.

    Resumes from the last whole checkpoint. Raises ``UserError`` for prompts or models that do not fit, and
    ``ParityError`` when the engine and the trainer turn out to hold different models.
    """
    from align.stages.rl import train

    return train(context)
