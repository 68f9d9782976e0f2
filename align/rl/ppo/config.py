"""Arguments of PPO: what every trainer that samples takes, and critic, advantages and clipping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.rl.arguments import RolloutArguments


@dataclass
class PPOConfig(RolloutArguments):
    """Field names and meanings are those of the ``ppo`` stage; counts are over all processes together."""

    critic_learning_rate: float | None = field(default=None, metadata={"help": "By default the policy's."})
    critic_head_learning_rate: float | None = field(
        default=None, metadata={"help": "By default the critic's, and a tenth of it where its trunk has adapters."}
    )
    critic_warmup_updates: int = field(default=0, metadata={"help": "First updates in which only the critic learns."})
    critic_adam_epsilon: float = field(
        default=1e-8,
        metadata={"help": "Smaller: below a head that starts at zero, gradients are, and 1e-5 would swallow them."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    truncation: Literal["bootstrap", "terminal"] = field(
        default="terminal",
        metadata={"help": "What follows a response cut at max_tokens: the critic's value, or nothing."},
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1; the mean stays."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and variance 1 over the rollout's tokens."})
    clip_range: float = field(default=0.2, metadata={"help": "The ratio earns nothing further from 1 than this."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound on the ratio where the advantage is negative."}
    )
    value_clip_range: float | None = field(default=0.5, metadata={"help": "In units of reward; None for no clipping."})
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    loss_aggregation: Literal["token", "sequence", "constant"] = field(
        default="token",
        metadata={"help": "Every token weighs the same, or every response; constant: by max_tokens."},
    )
    critic_detach: bool = field(
        default=True, metadata={"help": "A head on the policy's trunk sends no gradient into it."}
    )
