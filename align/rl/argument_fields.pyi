"""Written by ``python -m align.rl.argument_stub``: change the configs in ``align.config.stages`` instead.

A class leaves out what it shares with ``DriftArguments``, which every trainer's arguments inherit, too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from align.config.stages.rl import RolloutFields

@dataclass
class DriftArguments:
    stage_config: ClassVar[type[RolloutFields]]
    updates: int = 100
    rollout_batch: int = 64
    samples_per_prompt: int = 4
    max_prompt_tokens: int = 1024
    max_tokens: int = 64
    temperature: float = 1.0
    num_epochs: int = 1
    num_mini_batches: int = 1
    learning_rate: float = ...
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    missing_eos_penalty: float | None = None
    length_penalty: float = 0.0
    probe_updates: int = 50
    ptx_coef: float = 0.0
    ptx_rows: int = 8
    eval_updates: int | None = None
    keep: Literal["last", "best", "best_gold"] = "last"
    keep_kl: float | None = None
    on_alarm: Literal["warn", "stop"] = "warn"
    completions: int = 8
    save_updates: int = 1
    kl_coef: float = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_budget: float | None = None
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 6.0
    kl_horizon: int = 10000
    truncated: Literal["learn", "mask"] = "learn"
    normalize_scores: bool = False
    score_clip: float | None = None
    entropy_coef: float = 0.0
    importance_cap: float | None = 2.0
    max_staleness: int = 0
    in_flight: Literal["wait", "continue"] = "wait"
    importance_sequence_cap: float | None = None

@dataclass
class PpoArguments:
    stage_config: ClassVar[type[RolloutFields]]
    critic_detach: bool = True
    critic_learning_rate: float | None = None
    critic_head_learning_rate: float | None = None
    critic_warmup_updates: int = 0
    gamma: float = 1.0
    turn_discount: float = 1.0
    lam: float = 0.95
    truncation: Literal["bootstrap", "terminal"] = "terminal"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    clip_range: float = 0.2
    dual_clip: float | None = None
    value_clip_range: float | None = 0.5
    vf_coef: float = 1.0
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"

@dataclass
class GrpoArguments:
    stage_config: ClassVar[type[RolloutFields]]
    samples_per_prompt: int = 8
    kl_coef: float = 0.04
    kl_in: Literal["reward", "loss"] = "loss"
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] | None = None
    clip_range: float | None = None
    clip_range_high: float | None = None
    zero_variance: Literal["keep", "resample"] = "keep"
    resample_rounds: int = 3
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

@dataclass
class RlooArguments:
    stage_config: ClassVar[type[RolloutFields]]
    clip_range: float = 0.2
    clip_range_high: float | None = None
    whiten_advantages: bool = False

@dataclass
class OnlineDpoArguments:
    stage_config: ClassVar[type[RolloutFields]]
    samples_per_prompt: int = 2
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

@dataclass
class RejectionArguments:
    stage_config: ClassVar[type[RolloutFields]]
    updates: int = 3
    rollout_batch: int = 512
    samples_per_prompt: int = 8
    num_mini_batches: int = 4
    best: int = 1
    threshold: float | list[float] | None = None
    truncated: Literal["learn", "mask"] = "mask"
