"""Fields of every stage that learns from responses it samples: ppo, grpo, rloo, online_dpo, rejection. Torch-free.

Left out: what a method does with a scored rollout, which its own stage says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config, stage_input
from align.config.launch import LaunchConfig
from align.config.stages.lint import LintSettings
from align.config.stages.training import sharding_objection
from align.config.trl_options import check_trainer_options
from align.config.tuning import FullTuning, Tuning
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind

ELSEWHERE = {
    "num_generations": "samples_per_prompt",
    "max_completion_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "response_length": "max_tokens",
    "num_iterations": "num_epochs",
    "num_ppo_epochs": "num_epochs",
    "max_prompt_length": "max_prompt_tokens",
    "epsilon": "clip_range",
    "cliprange": "clip_range",
    "epsilon_high": "clip_range_high",
    "loss_type": "loss",
    "beta": "kl_coef",
    "reward_funcs": "score",
}
"""What other trainers call a field here."""


class RolloutFields(Config):
    """One update samples ``rollout_batch`` responses, scores them and learns from them."""

    kind: ClassVar[str]

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained and is the reference too; usually the SFT stage."""
    prompts: stage_input(*PROMPT_SOURCES)  # type: ignore[valid-type]
    """Stage whose training prompts are answered."""
    reward: stage_input(Kind.REWARD) | list[stage_input(Kind.REWARD)] | None = None  # type: ignore[valid-type]
    """Reward stage that scores responses, or a list of them, an ensemble; or give ``score``, or both."""
    ensemble: Literal["mean", "minimum", "uncertainty"] = "mean"
    """One score from several reward models: ``uncertainty`` is the mean less their variance (arXiv 2310.02743)."""
    uncertainty_weight: float = Field(1.0, ge=0)
    """What ``ensemble: uncertainty`` multiplies the variance by."""
    reward_floor: float | None = Field(0.5, ge=0, lt=1)
    """Held-out accuracy above which the 95 % interval of every reward model must lie; null trains against any."""
    score: str | None = None
    """Verifiable function that scores responses: ``gold``, or an import path ``module:name``."""
    reward_weight: float = 1.0
    """Factor of the reward model's score in the sum with ``score``."""
    score_weight: float = 1.0
    """Factor of the verifiable function's score in the sum with the reward model's."""
    gold: str | None = None
    """Verifiable function that is only logged, to see whether it rises with the score: ``gold`` or ``module:name``."""
    tuning: Tuning = FullTuning()
    """Of policy and critic alike."""
    updates: int = Field(100, ge=1)
    """Rollouts sampled and learned from."""
    rollout_batch: int = Field(64, ge=1)
    """Responses per update; more is steadier and slower."""
    samples_per_prompt: int = Field(4, ge=1)
    """Responses to each prompt of an update; its prompt is then computed once for all of them."""
    max_prompts: int | None = Field(None, ge=1)
    """Prompts used at most, the first ones."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this are left out, and counted."""
    max_tokens: int = Field(64, ge=1)
    """Tokens per response at most; a longer one is cut off and has no end."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Logits are divided by it in sampling and in learning alike; what is learned as in SFT (``ptx`` rows, and the
    responses of ``rejection``) is learned at 1."""
    num_epochs: int = Field(1, ge=1)
    """Passes over each rollout; more learn more from it and drift further from what was sampled."""
    num_mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Responses in memory at once; changes no result. By default the largest divisor up to 16."""
    learning_rate: float = Field(gt=0, le=1)
    """Of the policy. LoRA wants some hundred times what full tuning wants, so there is no default."""
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rates fall: not at all, or to 0 along a line or a half cosine."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rates rise from 0."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of policy and critic are each scaled down to this norm."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products, bfloat16 twice as fast; weights and AdamW's state are float32 either way."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response that does not end; teaches to stop."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score per token of the response."""
    probe_updates: int = Field(50, ge=1)
    """Updates between two comparisons of the engine's log-probabilities with the trainer's; every start has one."""
    ptx: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Stage with answers to go on learning from beside PPO, against forgetting (arXiv 2203.02155)."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of their loss per token."""
    ptx_rows: int = Field(8, ge=1)
    """Rows of them per optimizer step."""
    eval_updates: int | None = Field(None, ge=1)
    """Updates between validations on held-out prompts; the start and the end are validated too. Null: none."""
    eval_prompts: int = Field(64, ge=1)
    """Held-out prompts answered at each validation at most: the first ones of the ``test`` split; where they choose the
    policy (``keep``) prompts of the ``train`` split, a fifth of its questions at most, that are not learned from."""
    keep: Literal["last", "best", "best_gold"] = "last"
    """Which policy the stage makes: the last one, or the one with the best validated score (or gold score). The
    ``test`` split, which is reported on, has no part in the choice."""
    keep_kl: float | None = Field(None, gt=0)
    """With ``keep: best``, only among policies within so many nats of KL a response."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """What a collapse, exploding lengths, or a score that climbs while gold falls does: a warning, or the run's end."""
    completions: int = Field(8, ge=0)
    """Responses of each update kept in ``completions.jsonl``."""
    save_updates: int = Field(1, ge=1)
    """Updates between checkpoints, what a killed stage repeats at most."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Other options of ``align.rl.PPOConfig`` and transformers' ``TrainingArguments``, checked against them."""
    lint: LintSettings = LintSettings()
    """What of the look at the prompts' tokens, before the first update, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"score", "gold", "lint"})

    @property
    def kept_per_prompt(self) -> int:
        """Responses to a prompt that are learned from."""
        return self.samples_per_prompt

    @property
    def micro_batch(self) -> int:
        """Responses in memory at once."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max(size for size in range(1, 17) if self.per_step % size == 0)

    @property
    def together(self) -> int:
        """Responses that are learned from in one micro-batch or not at all."""
        return 1

    @property
    def per_step(self) -> int:
        """Responses of an optimizer step."""
        return self.rollout_batch // self.samples_per_prompt * self.kept_per_prompt // self.num_mini_batches

    def micro_batch_of(self, processes: int) -> int:
        """Responses in memory at once in each of several processes; less than ``micro_batch`` only where none was set.

        It changes no number but by rounding: losses are sums over counts of the whole step.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        groups, most = self.per_step // processes // self.together, self.micro_batch // self.together
        return max((n for n in range(1, most + 1) if groups % n == 0), default=1) * self.together

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """Why the processes cannot share an optimizer step's responses, or hold the model, and what to do."""
        processes, least = launch.known or 1, self.micro_batch_size or self.together
        if self.per_step % (processes * least) == 0:
            return sharding_objection(launch, self.tuning, looks_back=True)
        most = max(n for n in range(1, processes + 1) if self.per_step % (n * least) == 0)
        size = f" x micro_batch_size {least}" if least > 1 else ""
        return (
            f"an optimizer step learns from {self.per_step} responses of rollout_batch {self.rollout_batch}, all "
            f"processes together, which is not a multiple of {processes} processes{size}; take {most}, or another "
            "rollout_batch."
        )

    @model_validator(mode="before")
    @classmethod
    def _known_by_our_names(cls, given: Any) -> Any:
        for theirs, ours in ELSEWHERE.items():
            translated = theirs not in cls.model_fields and ours in cls.model_fields
            if isinstance(given, dict) and theirs in given and translated:
                raise ValueError(f"unknown key '{theirs}': it is called '{ours}' here.")
        return given

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        check_trainer_options(cls.kind, options, reserved=set(cls.model_fields))
        return options

    @model_validator(mode="after")
    def _scored_by_something(self) -> Self:
        if not self.reward and self.score is None:
            raise ValueError("neither reward nor score is set; name a reward stage, or a verifiable function, or both.")
        return self

    @model_validator(mode="after")
    def _kept_and_mixed_in(self) -> Self:
        if self.keep != "last" and self.eval_updates is None:
            raise ValueError(f"keep is {self.keep}, which needs validations; set eval_updates.")
        if self.keep == "best_gold" and self.gold is None:
            raise ValueError("keep is best_gold, but no gold function is named; set gold, or take `keep: best`.")
        if self.keep == "last" and self.keep_kl is not None:
            raise ValueError("keep_kl limits `keep: best`, but keep is last; set keep, or leave keep_kl out.")
        if (self.ptx is None) != (self.ptx_coef == 0):
            raise ValueError("ptx and ptx_coef go together: name a stage with answers, and a weight above 0.")
        return self

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.rollout_batch % self.samples_per_prompt:
            self._say_what_divides(self.rollout_batch, "samples_per_prompt", self.samples_per_prompt)
        kept = self.rollout_batch // self.samples_per_prompt * self.kept_per_prompt
        for name, divisor in (
            ("num_mini_batches", self.num_mini_batches),
            ("num_mini_batches x micro_batch_size", self.num_mini_batches * self.micro_batch),
        ):
            if kept % divisor:
                self._say_what_divides(kept, name, divisor)
        return self

    @model_validator(mode="after")
    def _tuning_fits_rollouts(self) -> Self:
        if self.tuning.online_objection is not None:
            raise ValueError(f"{self.tuning.online_objection}.")
        if isinstance(self.tuning, FullTuning) and (self.tuning.scheduled or self.tuning.layer_decay < 1):
            raise ValueError(
                "tuning.unfreeze, lisa and layer_decay are for stages that train on rows (sft, dpo, ...); those that "
                "sample train the same weights in every update. `freeze` works here too."
            )
        return self

    def _say_what_divides(self, responses: int, name: str, divisor: int) -> None:
        batch = f"rollout_batch {self.rollout_batch}"
        if responses != self.rollout_batch:
            raise ValueError(
                f"{batch} has {responses} responses that are learned from ({self.kept_per_prompt} of "
                f"{self.samples_per_prompt} a prompt), which is not a multiple of {name} {divisor}."
            )
        raise ValueError(
            f"{batch} is not a multiple of {name} {divisor}; the next one is {-(-responses // divisor) * divisor}."
        )

    def identities(self, base: Path) -> dict[str, str]:
        """The scoring functions, by their code."""
        from align.config.user_functions import function_identity

        named = {"score": self.score, "gold": self.gold}
        return {name: function_identity(path) for name, path in named.items() if path is not None}


class DriftFields(RolloutFields):
    """Those of methods that weigh the score against drift from the reference: ppo, grpo, rloo."""

    kl_coef: float = Field(0.05, ge=0)
    """Reward lost per nat of drift from the reference; 0 lets the policy go anywhere the score is high."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether drift is paid for in each token's reward, or by a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """``k1`` in the reward; in the loss ``k2`` (the KL's own gradient, the default) or ``k3`` (the reverse KL's)."""
    kl_budget: float | None = Field(None, gt=0)
    """Nats per response: a rollout that has drifted further ends the run before anything is learned from it."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive`` moves ``kl_coef`` so that the KL of a response nears ``kl_target`` (arXiv 1909.08593)."""
    kl_target: float = Field(6.0, gt=0)
    """Nats per response that the adaptive controller aims at."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which it reacts."""
    truncated: Literal["learn", "mask"] = "learn"
    """``mask`` leaves responses cut at ``max_tokens`` out of the losses; metrics count them anyway."""
    normalize_scores: bool = False
    """Bring scores to mean 0 and variance 1 over all responses so far, before clipping and penalties."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are clipped to plus or minus this."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(2.0, ge=1)
    """Cap on the weights that correct for the engine's log-probabilities being not quite the trainer's; null: none."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Updates that sampling runs ahead, with weights as old; with 1 servers sample while the trainer learns."""
    importance_sequence_cap: float | None = Field(None, gt=1)
    """Leave out responses whose whole ratio of trainer to engine is outside [1/this, this]; null: none."""

    @model_validator(mode="after")
    def _staleness_is_corrected(self) -> Self:
        if self.max_staleness and self.importance_cap is None:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, so older weights sample, which importance_cap corrects for; "
                "set it (2.0 by default), or `max_staleness: 0`."
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_its_place(self) -> Self:
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(
                f"kl_estimator is {self.kl_estimator}, whose gradient as a reward nearly vanishes close to the "
                "reference; take k1, or set `kl_in: loss`."
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator is k1, which as a loss has no gradient on average; take k2 or k3.")
        return self
