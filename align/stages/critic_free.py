"""The work of the stages grpo, rloo, online_dpo and rejection: which trainer, with which of the config's fields."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext
from align.rl.arguments import RolloutArguments
from align.rl.critic_free.best_of_n import BestOfNTrainer
from align.rl.critic_free.config import BestOfNConfig, GRPOConfig, OnlineDPOConfig, RLOOConfig
from align.rl.critic_free.groups import GRPOTrainer, RLOOTrainer
from align.rl.critic_free.pairs import OnlineDPOTrainer
from align.rl.critic_free.trainer import CriticFreeTrainer
from align.rl.online_trainer import OnlineTrainer
from align.stages.rl import Start, arguments, run_online

SHARED = (
    *("updates", "rollout_batch", "samples_per_prompt", "max_prompt_tokens", "max_tokens", "temperature", "num_epochs"),
    *("num_mini_batches", "learning_rate", "weight_decay", "max_grad_norm", "missing_eos_penalty", "length_penalty"),
    *("probe_updates", "save_updates", "ptx_coef", "ptx_rows", "eval_updates", "keep", "keep_kl", "on_alarm"),
    "completions",
)
DRIFT = (
    *("kl_coef", "kl_in", "kl_estimator", "kl_budget", "kl_controller", "kl_target", "kl_horizon", "truncated"),
    *("normalize_scores", "score_clip", "entropy_coef", "importance_cap", "importance_sequence_cap"),
    "max_staleness",
)
GRPO = ("loss", "clip_range", "clip_range_high", "scale_rewards", "zero_variance", "resample_rounds", "overlong_buffer")

KINDS: dict[str, tuple[type[CriticFreeTrainer], type[RolloutArguments], tuple[str, ...]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, (*SHARED, *DRIFT, *GRPO, "overlong_penalty")),
    "rloo": (RLOOTrainer, RLOOConfig, (*SHARED, *DRIFT, "clip_range", "clip_range_high", "whiten_advantages")),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, (*SHARED, "loss", "beta", "label_smoothing")),
    "rejection": (BestOfNTrainer, BestOfNConfig, (*SHARED, "best", "threshold", "truncated")),
}
"""Stage kind -> trainer, its arguments, and the fields that both config classes have, with the same meaning."""


def train(context: StageContext) -> dict[str, Any]:
    """See ``align.stages.ppo.run``."""
    return run_online(context, _trainer)


def _trainer(start: Start) -> OnlineTrainer:
    made, config, passed_on = KINDS[start.context.config.kind]
    return made(**start.options, args=arguments(start.context, config, passed_on))
