"""What every trainer that samples takes: transformers' ``TrainingArguments``, rollouts, scores, drift, checkpoints.

One *update* is a rollout of ``rollout_batch`` responses and ``num_epochs * num_mini_batches`` optimizer steps on what
is kept of it. ``per_device_train_batch_size`` is the micro-batch in responses; accumulation and ``max_steps`` follow.
Left out: how a rollout is learned from (``config.py``, ``align.rl.critic_free.config``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from align.training.arguments import use_one_device


@dataclass
class RolloutArguments(TrainingArguments):
    """Field names and meanings are those of the stages; counts are over all processes together."""

    updates: int = field(default=100, metadata={"help": "Rollouts to sample and learn from."})
    rollout_batch: int = field(default=64, metadata={"help": "Responses per update."})
    samples_per_prompt: int = field(default=1, metadata={"help": "Responses to each prompt of a rollout."})
    max_tokens: int = field(default=64, metadata={"help": "Tokens of a response at most."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Longer prompts are left out, and counted."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the rollout's log-probabilities."})
    num_epochs: int = field(default=1, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass."})
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Of the policy; LoRA wants far more, about 1e-4 to 1e-3."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "PPO's usual epsilon, of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "See TrainingArguments."})
    kl_coef: float = field(default=0.05, metadata={"help": "Reward lost per nat of drift from the reference."})
    kl_in: Literal["reward", "loss"] = field(default="reward", metadata={"help": "Where drift is paid for."})
    kl_estimator: Literal["k1", "k2", "k3"] | None = field(
        default=None, metadata={"help": "k1 in the reward, k2 or k3 in the loss; by default k1 there and k2 here."}
    )
    kl_budget: float | None = field(
        default=None, metadata={"help": "Nats per response; a rollout with more ends the run before learning from it."}
    )
    kl_controller: Literal["fixed", "adaptive"] = field(default="fixed", metadata={"help": "Ziegler's, if adaptive."})
    kl_target: float = field(default=6.0, metadata={"help": "Nats per response that the adaptive controller aims at."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Responses over which it reacts."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from unfinished responses' scores."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to plus or minus this."})
    normalize_scores: bool = field(default=False, metadata={"help": "Mean 0 and variance 1 over all scores so far."})
    length_penalty: float = field(default=0.0, metadata={"help": "Subtracted from a score per response token."})
    truncated: Literal["learn", "mask"] = field(
        default="learn", metadata={"help": "Learn from responses cut at max_tokens, or leave them out of the losses."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    importance_cap: float | None = field(
        default=2.0, metadata={"help": "Cap on the weight correcting the sampler's log-probabilities; None for none."}
    )
    importance_sequence_cap: float | None = field(
        default=None, metadata={"help": "Drop responses whose whole ratio to the sampler is outside [1/this, this]."}
    )
    max_staleness: int = field(
        default=0, metadata={"help": "Updates that sampling runs ahead of learning; needs importance_cap."}
    )
    reuse_forward: float = field(
        default=0.0,
        metadata={
            "help": "Share of an update's first mini-batch learned from the passes that measured it, whose activations "
            "wait that long."
        },
    )
    padding_free: bool = field(default=True, metadata={"help": "Run real tokens only, where the model allows."})
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Run once what several prompts begin with, and a prompt for all its responses; padding-free only."
        },
    )
    probe_parity: bool = field(
        default=True, metadata={"help": "Compare engine and trainer at start and after resuming."}
    )
    probe_updates: int = field(default=50, metadata={"help": "Updates between two such comparisons."})
    save_updates: int = field(default=1, metadata={"help": "Updates between checkpoints."})
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the supervised loss on ptx_dataset."})
    ptx_rows: int = field(default=8, metadata={"help": "Of its rows per optimizer step."})
    eval_updates: int | None = field(default=None, metadata={"help": "Updates between validations on eval_dataset."})
    keep: Literal["last", "best", "best_gold"] = field(
        default="last", metadata={"help": "Policy at the end: the last, or the best validated score or gold score."}
    )
    keep_kl: float | None = field(default=None, metadata={"help": "Best among policies within these nats of KL."})
    on_alarm: Literal["warn", "stop"] = field(default="warn", metadata={"help": "What an alarm does."})
    completions: int = field(default=8, metadata={"help": "Responses of each update written down; 0 for none."})

    loss_estimator: ClassVar[Literal["k2", "k3"]] = "k2"
    """Estimator of a KL term in the loss, where none is given."""
    corrects: ClassVar[bool] = True
    """Whether the loss weighs a token by how likely the policy is to say what another one said."""

    def __post_init__(self) -> None:
        """Derive the Trainer's counts. Raises ``ValueError`` for batch sizes that do not divide."""
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run
        self.remove_unused_columns = False
        self.ignore_data_skip = True  # the position in the data follows from the update
        super().__post_init__()
        use_one_device(self)
        self._check()
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else self.loss_estimator
        self.gradient_accumulation_steps = self.local_learned // (
            self.num_mini_batches * self.per_device_train_batch_size
        )
        self.max_steps = self.updates * self.steps_per_update
        self.logging_steps = self.steps_per_update
        self.save_steps = self.save_updates * self.steps_per_update

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.num_epochs * self.num_mini_batches

    @property
    def kept_per_prompt(self) -> int:
        """Responses to a prompt that are learned from; all of them unless a method chooses."""
        return self.samples_per_prompt

    @property
    def local_learned(self) -> int:
        """Responses per update that this process learns from."""
        return self.rollout_batch // self.samples_per_prompt * self.kept_per_prompt // int(self.world_size)

    def _check(self) -> None:
        if self.rollout_batch % self.samples_per_prompt:
            raise ValueError(
                f"rollout_batch {self.rollout_batch} is not a multiple of samples_per_prompt {self.samples_per_prompt}."
            )
        together = self.num_mini_batches * self.per_device_train_batch_size * self.world_size
        learned = self.rollout_batch // self.samples_per_prompt * self.kept_per_prompt
        if learned % together:
            kept = "" if learned == self.rollout_batch else f", of which {learned} responses are learned from,"
            raise ValueError(
                f"rollout_batch {self.rollout_batch}{kept} is not a multiple of num_mini_batches "
                f"{self.num_mini_batches} x per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{self.world_size} processes."
            )
        for name in ("updates", "max_tokens", "num_epochs", "num_mini_batches", "save_updates", "probe_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness is {self.max_staleness}; it must be at least 0.")
        if self.max_staleness and (self.importance_cap is None or not self.corrects):
            raise ValueError(
                f"max_staleness is {self.max_staleness}, so older weights sample, which the loss must correct for: set "
                "importance_cap, or max_staleness 0 for a method whose loss has no such weights."
            )
        if not 0 <= self.reuse_forward <= 1:
            raise ValueError(f"reuse_forward is {self.reuse_forward}; it is a share of micro-batches, from 0 to 1.")
        if self.reuse_forward and self.world_size > 1:
            raise ValueError("reuse_forward works in one process: DDP knows one backward pass for each forward pass.")
        if self.keep != "last" and self.eval_updates is None:
            raise ValueError(f"keep is {self.keep}, which needs validations; set eval_updates.")
        if self.kl_estimator is not None and (self.kl_in == "reward") != (self.kl_estimator == "k1"):
            right = {"reward": "only k1 has the KL's gradient", "loss": "k1 has none, on average; take k2 or k3"}
            raise ValueError(f"kl_estimator is {self.kl_estimator}, but as a {self.kl_in} {right[self.kl_in]}.")
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature is {self.temperature}; log-probabilities need one above 0.")

    def fingerprint(self) -> dict[str, Any]:
        """The fields that decide where a resumed run stands in its data; a checkpoint remembers them."""
        names = (
            "seed",
            "rollout_batch",
            "samples_per_prompt",
            "num_epochs",
            "num_mini_batches",
            "temperature",
            "max_tokens",
            "max_staleness",
        )
        return {name: getattr(self, name) for name in names}
