"""Settings of stage ``ppo``. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.launch import LaunchConfig
from align.config.stages.rl import DriftFields


class PpoConfig(DriftFields):
    """One update samples ``rollout_batch`` responses, scores them and learns from them.

    Memory: LoRA needs the policy once, in float32 (with its adapter off it is the reference), and the reward model
    once, in ``precision`` (the critic is an adapter on it). Full tuning needs a second, trained copy of both, with
    AdamW's state. `align plan --memory` shows the amounts for a model, and what other choices would cost.
    """

    adam_epsilon: ClassVar[float] = 1e-5
    """AdamW's epsilon for the policy; usual for PPO."""
    keyed_when_set: ClassVar[frozenset[str]] = DriftFields.keyed_when_set | {"turn_discount"}

    critic: Literal["reward", "policy", "head"] | None = None
    """Model that the critic starts from: by default the reward model, else the policy. From ``policy`` it starts at 0.

    Memory: with LoRA, ``reward`` and ``policy`` cost a second adapter and a head on weights that are loaded anyway.
    With full tuning they cost a separate model, 16 bytes a parameter with AdamW. ``head``, a linear head on the
    policy's hidden states, costs one vector and no forward pass.
    """
    critic_detach: bool = True
    """For ``critic: head``: stop the value loss at the head. False lets it also train the policy's trunk."""
    critic_learning_rate: float | None = Field(None, gt=0, le=1)
    """Learning rate of the critic; by default the policy's."""
    critic_head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Learning rate of the critic's value head; by default the critic's, with LoRA a tenth of it."""
    critic_warmup_updates: int = Field(0, ge=0)
    """First updates in which only the critic learns."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    turn_discount: float = Field(1.0, gt=0, le=1)
    """For episodes: discount at each step from one turn to the next, on top of ``gamma``."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation: 1 trusts the returns, 0 the critic."""
    truncation: Literal["bootstrap", "terminal"] = "terminal"
    """Value after a response cut at ``max_tokens``: the critic's estimate (``bootstrap``), or 0 (``terminal``)."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, keeping their mean."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the update's tokens."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """Clip range of a token's probability ratio around 1."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the ratio for negative advantages (arXiv 1912.09729), usually 3."""
    value_clip_range: float | None = Field(0.5, gt=0)
    """Maximum change of a value per update, in units of reward. Null switches value clipping off."""
    vf_coef: float = Field(1.0, gt=0)
    """Weight of the value loss."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """``token``: every token weighs the same. ``sequence``: every response does. ``constant``: token sums are divided
    by ``max_tokens``."""

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """As for every stage that samples; and DeepSpeed has no critic warm-up: its optimizer steps every weight."""
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
    def _check_critic(self) -> Self:
        if self.critic == "reward" and not self.reward:
            raise ValueError("critic is reward, but no reward stage is named; set reward, or `critic: policy`.")
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates {self.critic_warmup_updates} leaves none of {self.updates} updates for the "
                "policy; lower it, or raise updates."
            )
        if self.whiten_rewards and self.rollout_batch < 8:
            raise ValueError(f"whiten_rewards needs a rollout_batch of at least 8; it is {self.rollout_batch}.")
        return self
