"""Settings shared by the stages that learn from responses they sample: ppo, grpo, rloo, online_dpo, rejection.

The trainers in ``align.rl`` read these configs, so a value has one name from the YAML to the loss. The settings of a
single method have a separate file. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import PrecisionSetting, stage_input
from align.config.chat_template import ThinkingBudget, check_stage_budget
from align.config.environment import EnvironmentConfig, take_episode_tokens
from align.config.options import OWNED, OWNED_BY_ROLLOUTS, TrainerOptions
from align.config.runtime.launch import LaunchConfig
from align.config.scores import Score, ScoreValidation, reward_names, score_identities
from align.config.stages.continue_from import MEMORY_FIELDS, ChangedStage
from align.config.stages.evaluation.during_training import TrainingEvaluation
from align.config.stages.lint import LintSettings
from align.config.stages.stored_rollouts import ReplayFolder, StoredRollouts
from align.config.stages.training import (
    DefaultRates,
    LearningRate,
    LongRows,
    MicroBatchSize,
    PeakRates,
    Recomputation,
    sharding_objection,
)
from align.config.tuning import FullTuning, Tuning
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind


class RolloutFields(DefaultRates, TrainerOptions):
    """One update samples ``rollout_batch`` responses, scores them and learns from them."""

    rates: ClassVar[PeakRates] = PeakRates(3e-4, 1e-5)
    owned_options: ClassVar[dict[str, str]] = OWNED | OWNED_BY_ROLLOUTS
    trainer_class: ClassVar[str] = "align.rl.arguments:RolloutArguments"
    adam_epsilon: ClassVar[float] = 1e-8
    """AdamW's epsilon, unless ``trainer`` sets another."""

    keyed_when_set: ClassVar[frozenset[str]] = frozenset(
        {"continue_from", "end_after", "environment", "replay", "thinking_budget", "train_router"}
    )

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained. It is also the reference. Usually the SFT stage."""
    prompts: stage_input(*PROMPT_SOURCES)  # type: ignore[valid-type]
    """Stage whose training prompts the policy answers."""
    reward: stage_input(Kind.REWARD) | list[stage_input(Kind.REWARD)] | None = None  # type: ignore[valid-type]
    """Reward stage that scores responses, or a list of them as an ensemble. Use this, ``score``, or both."""
    environment: EnvironmentConfig | None = None
    """Environment that the policy acts in over several turns, with tools or by answers. It scores episodes; ``reward``
    and ``score``, which read an episode's last turn, add to that (docs/environments.md)."""
    ensemble: Literal["mean", "minimum", "uncertainty"] = "mean"
    """Combination of several reward models' scores. ``uncertainty``: their mean minus their variance (arXiv
    2310.02743)."""
    uncertainty_weight: float = Field(1.0, ge=0)
    """Weight of the variance for ``ensemble: uncertainty``."""
    reward_floor: float | None = Field(0.5, ge=0, lt=1)
    """Held-out accuracy that the 95 % interval of every reward model must exceed. Null accepts any reward model."""
    score: Score = None
    """Function that verifies and scores responses (``gold``, or an import path ``module:name``), or a list of rewards
    with weights."""
    reward_weight: float = 1.0
    """Weight of the reward model's score in the sum with ``score``."""
    score_weight: float = 1.0
    """Weight of the function's score in the sum with the reward model's. A list's entries have their own weights."""
    gold: str | None = None
    """Function that is only logged, to check that it rises with the score: ``gold`` or ``module:name``."""
    tuning: Tuning = FullTuning()
    """Tuning of the policy and the critic."""
    train_router: bool = False
    """Also train the routers of a mixture of experts. By default they keep the choice of experts that sampling saw."""
    continue_from: stage_input(Kind.POLICY) | ChangedStage | None = None  # type: ignore[valid-type]
    """Finished stage of the same kind to continue from, with its weights, critic, optimizer, controllers and position
    in the prompts. Fields that are not set, including ``seed``, are that stage's. ``updates`` counts from its start.
    ``{stage: ppo, change: {kl_coef: 0.5}}`` continues with other settings."""
    updates: int = Field(100, ge=1)
    """Rollouts to sample and learn from."""
    end_after: int | None = Field(None, ge=1)
    """Updates after which the stage ends, with the schedule of its full length. ``at`` of a stage that continues this
    stage sets it."""
    rollout_batch: int = Field(64, ge=1)
    """Responses per update. More is more stable and slower."""
    samples_per_prompt: int = Field(4, ge=1)
    """Responses to each prompt. The prompt is computed once for all of them."""
    max_prompts: int | None = Field(None, ge=1)
    """Use only the first so many prompts."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are skipped and counted."""
    long_rows: LongRows = "refuse"
    """``refuse`` ends the stage before sampling if more than half of the prompts are longer than that."""
    max_tokens: int = Field(64, ge=1)
    """Maximum tokens per response. A longer one is truncated."""
    thinking_budget: ThinkingBudget = None
    """Close a thought by force after this many tokens, and continue with the answer (docs/thinking.md). Forced tokens
    are not learned. Null: no limit."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature. The loss also uses it, except SFT's loss (``ptx`` rows, ``rejection``), which uses 1."""
    num_epochs: int = Field(1, ge=1)
    """Passes over each rollout. More passes learn more from it and drift further from the sampled policy."""
    num_mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    micro_batch_size: MicroBatchSize = "auto"
    """Responses in memory at once; changes no result. ``auto`` is at first the largest divisor of a step's responses up
    to 16, and half as many when a step runs out of memory."""
    gradient_checkpointing: Recomputation = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time, and the same result. ``auto``
    does so once the smallest micro-batch runs out of memory."""
    learning_rate: LearningRate = "auto"
    """Learning rate of the policy. ``auto`` follows from the kind, ``tuning`` and the model's size (docs/methods.md);
    the plan shows its value."""
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rates: constant, or falling to 0 along a line or a half cosine."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rates rise from 0."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm to clip to, for the policy and the critic separately."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products, and of frozen matrices below adapters; ``auto`` measures which one this device
    multiplies faster in. Trained weights and AdamW's state are float32 either way."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a response without an end token. Teaches the policy to stop."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score for each token of the response."""
    probe_updates: int = Field(50, ge=1)
    """Updates between two checks that engine and trainer agree on log-probabilities. Every start has a check."""
    ptx: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Stage with answers to keep training on during RL, against forgetting (arXiv 2203.02155)."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the supervised loss per token of the ``ptx`` answers."""
    ptx_rows: int = Field(8, ge=1)
    """``ptx`` rows per optimizer step."""
    eval_updates: int | None = Field(None, ge=1)
    """Updates between validations on held-out prompts. The start and the end are also validated. Null: no
    validation."""
    eval_prompts: int = Field(64, ge=1)
    """Maximum held-out prompts per validation: the first ones of the ``test`` split. Where they select the policy
    (``keep``) they are held out of the ``train`` split instead, at most a fifth of its questions."""
    evaluate: TrainingEvaluation | None = None
    """Tasks of `align eval` to run during training: ``{every: 10, tasks: {gsm8k: {files: [dev.jsonl]}}}``."""
    keep: Literal["last", "best", "best_gold"] = "last"
    """Policy that the stage saves: the last policy, or the policy with the best validated score (or gold score), or the
    best ``evaluate.best_metric``. The ``test`` split, which is reported, plays no part in the selection."""
    keep_kl: float | None = Field(None, gt=0)
    """For ``keep: best`` by score: maximum KL to the reference of the saved policy, in nats per response."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """Warn, or end the stage as failed, on an alarm such as a collapse, exploding lengths, or a score that rises while
    gold falls. The policy of the last checkpoint before the alarm is kept as a model folder."""
    replay: stage_input(Kind.POLICY) | ReplayFolder | None = None  # type: ignore[valid-type]
    """Stage whose stored rollouts this stage learns from, or ``{folder: PATH}``, instead of sampling. No engine and no
    reward starts; with the same settings the weights are equal bit for bit (docs/rollouts.md)."""
    rollouts: StoredRollouts = StoredRollouts()
    """Parquet files of all responses with their tokens, scores and measurements: ``{keep: 1.0, max_gb: 2}``."""
    save_updates: int = Field(1, ge=1)
    """Updates between checkpoints. A killed stage repeats at most this many."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further options of transformers' ``TrainingArguments`` and of ``align.rl.arguments``. They are checked."""
    lint: LintSettings = LintSettings()
    """Checks of the prompts' tokens to skip before the first update (docs/lint.md)."""
    score_validation: ScoreValidation = ScoreValidation()
    """Validation of ``score`` on reference, empty and wrong answers before a model is loaded (docs/rewards.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"score", "gold", "lint", "environment", "score_validation"})
    retired: ClassVar[Mapping[str, Any]] = {"completions": 8}
    has_token_credit: ClassVar[bool] = False
    """True for a method whose tokens have separate advantages, so that scores of steps have an effect."""

    @classmethod
    def for_trainer(cls, **settings: Any) -> Self:
        """Return the settings of a trainer in a script, which passes models, rows and functions instead of stages.

        Raises pydantic's ``ValidationError``, as for a stage.
        """
        names = {"policy": "policy", "prompts": "prompts", "score": "scorer", "gold": "gold"}
        if settings.get("ptx_coef"):
            names["ptx"] = "ptx"
        if settings.get("critic") == "reward":
            names["reward"] = "reward"
        if settings.get("in_flight") == "continue":
            # The trainer gets the player of episodes itself, and checks that there is one.
            tokens = settings.get("max_tokens", cls.model_fields["max_tokens"].default)
            settings["environment"] = EnvironmentConfig(verifiers="any", max_turns=1, max_tokens=tokens)
        return cls(**(names | settings))

    @property
    def best_metric(self) -> str | None:
        """The task's metric that ``keep: best`` uses instead of the validated score, if any."""
        return None if self.evaluate is None else self.evaluate.best_metric

    def fields_outside_key(self) -> set[str]:
        """Return ``identified``, fields that change no result, ``evaluate`` and a folder to replay, which have
        identities."""
        replayed = {"replay"} if isinstance(self.replay, ReplayFolder) else set()
        return {*super().fields_outside_key(), "evaluate", "long_rows", "rollouts", *MEMORY_FIELDS, *replayed}

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.num_epochs * self.num_mini_batches

    @property
    def prompts_per_update(self) -> int:
        """Prompts of a rollout, over all processes."""
        return self.rollout_batch // self.samples_per_prompt

    @property
    def kept_per_prompt(self) -> int:
        """Responses per prompt that the policy learns from."""
        return self.samples_per_prompt

    @property
    def micro_batch(self) -> int:
        """Responses in memory at once, unless memory runs out."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        # The largest divisor up to 16: micro-batches fill an optimizer step exactly.
        return max(size for size in range(1, 17) if self.responses_per_step % size == 0)

    @property
    def recomputes(self) -> bool:
        """True if activations are recomputed from the first step on."""
        return self.gradient_checkpointing is True

    @property
    def indivisible_responses(self) -> int:
        """Number of responses that must share a micro-batch."""
        return 1

    @property
    def responses_per_step(self) -> int:
        """Responses per optimizer step, over all processes."""
        return self.prompts_per_update * self.kept_per_prompt // self.num_mini_batches

    def micro_batch_of(self, processes: int) -> int:
        """Return the responses in memory at once in each of several processes.

        Smaller than ``micro_batch`` only where ``micro_batch_size`` is not set. The size changes results by rounding
        only: losses are sums divided by counts of the entire step.
        """
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        return self._divisor_up_to(self.micro_batch, processes)

    def micro_batch_sizes(self, processes: int) -> tuple[int, ...]:
        """Return the responses in memory of each process: the first size, and those to try if memory runs out."""
        sizes = [self.micro_batch_of(processes)]
        while self.micro_batch_size == "auto" and sizes[-1] > self.indivisible_responses:
            sizes.append(self._divisor_up_to(sizes[-1] // 2, processes))
        return tuple(sizes)

    def _divisor_up_to(self, most: int, processes: int) -> int:
        """Return the largest number of responses up to ``most`` that divides each process's share of a step."""
        unit = self.indivisible_responses
        # Count in units, such as the two responses of a pair, which must not be separated.
        units_per_process = self.responses_per_step // processes // unit
        return max((size for size in range(1, most // unit + 1) if units_per_process % size == 0), default=1) * unit

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """Return why the processes cannot share an optimizer step or hold the model, and the remedy; None if fine."""
        processes = launch.known or 1
        unit = self.indivisible_responses if self.micro_batch_size == "auto" else self.micro_batch_size
        if self.responses_per_step % (processes * unit) == 0:
            evaluation = None if self.evaluate is None else self.evaluate.launch_objection(launch)
            return evaluation or sharding_objection(launch, self.tuning, looks_back=True)
        possible = max(count for count in range(1, processes + 1) if self.responses_per_step % (count * unit) == 0)
        size = f" x micro_batch_size {unit}" if unit > 1 else ""
        return (
            f"an optimizer step learns from {self.responses_per_step} responses of rollout_batch {self.rollout_batch}, "
            f"over all processes. That is not a multiple of {processes} processes{size}. Use {possible} processes, or "
            "another rollout_batch."
        )

    @model_validator(mode="after")
    def _check_scorer(self) -> Self:
        if not self.reward and self.score is None and self.environment is None:
            raise ValueError("neither reward nor score is set; name a reward stage, a function, or both.")
        if isinstance(self.score, list) and self.score_weight != 1.0:
            raise ValueError("score_weight is for a score that is one function; set the `weight` of each in the list.")
        if self.ensemble != "mean" and not (isinstance(self.reward, list) and len(self.reward) > 1):
            raise ValueError(
                f"ensemble is {self.ensemble}, which needs several reward models; name a list of them as reward, or "
                "remove ensemble."
            )
        if self.reward and "reward" in reward_names(self.score):
            raise ValueError("the name 'reward' in score is that of the field reward; set another `name`.")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        entries = self.score if isinstance(self.score, list) else []
        for index, entry in enumerate(entries):
            if entry.steps is None:
                continue
            if not self.has_token_credit:
                raise ValueError(
                    f"score[{index}].steps gives tokens separate rewards, and this method has one advantage per "
                    "response; use the stage ppo, or remove steps and return one number."
                )
            if self.environment is not None:
                raise ValueError(
                    f"score[{index}].steps is for single responses, and an environment scores turns: return "
                    '{"turn": [...]} from its score, or remove steps.'
                )
        return self

    @model_validator(mode="after")
    def _use_episode_tokens(self) -> Self:
        take_episode_tokens(self)
        check_stage_budget(self)
        return self

    @model_validator(mode="after")
    def _check_validation_and_ptx(self) -> Self:
        if self.best_metric is not None and (self.keep != "best" or self.keep_kl is not None):
            raise ValueError("evaluate.best_metric is for `keep: best` without keep_kl; set keep, or drop keep_kl.")
        if self.keep != "last" and self.eval_updates is None and self.best_metric is None:
            raise ValueError(f"keep is {self.keep}, which needs validations; set eval_updates.")
        if self.keep == "best_gold" and self.gold is None:
            raise ValueError("keep is best_gold, but no gold function is named; set gold, or `keep: best`.")
        if self.keep == "last" and self.keep_kl is not None:
            raise ValueError("keep_kl limits `keep: best`, but keep is last; set keep, or remove keep_kl.")
        if (self.ptx is None) != (self.ptx_coef == 0):
            raise ValueError("ptx and ptx_coef go together: set a stage with answers and a weight above 0.")
        return self

    @model_validator(mode="after")
    def _check_evaluate(self) -> Self:
        if self.evaluate is None:
            return self
        objection = self.evaluate.model_objection(has_vocabulary=True, has_pairs=False, tuning=self.tuning)
        if objection is not None:
            raise ValueError(f"evaluate.{objection}")
        return self

    @model_validator(mode="after")
    def _check_replay(self) -> Self:
        if self.replay is None:
            return self
        if self.continue_from is not None:
            raise ValueError("replay begins with the first update, and continue_from after it; remove one of them.")
        for name in ("eval_updates", "evaluate"):
            if getattr(self, name) is not None:
                raise ValueError(f"replay learns without an engine, and {name} needs one; remove {name}.")
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> Self:
        if self.rollout_batch % self.samples_per_prompt:
            self._refuse_batch_size(self.rollout_batch, "samples_per_prompt", self.samples_per_prompt)
        learned = self.rollout_batch // self.samples_per_prompt * self.kept_per_prompt
        # Only the responses that are kept are learned from, so these must divide evenly.
        if learned % self.num_mini_batches:
            self._refuse_batch_size(learned, "num_mini_batches", self.num_mini_batches)
        micro_batches = self.num_mini_batches * self.micro_batch
        if learned % micro_batches:
            self._refuse_batch_size(learned, "num_mini_batches x micro_batch_size", micro_batches)
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.tuning.online_objection is not None:
            raise ValueError(f"{self.tuning.online_objection}.")
        if isinstance(self.tuning, FullTuning) and (self.tuning.scheduled or self.tuning.layer_decay < 1):
            raise ValueError(
                "tuning.unfreeze, lisa and layer_decay are for stages that train on rows (sft, dpo, ...). Stages that "
                "sample train the same weights in every update. `freeze` works here too."
            )
        return self

    def _refuse_batch_size(self, responses: int, name: str, divisor: int) -> None:
        batch = f"rollout_batch {self.rollout_batch}"
        if responses != self.rollout_batch:
            raise ValueError(
                f"{batch} has {responses} responses to learn from ({self.kept_per_prompt} of "
                f"{self.samples_per_prompt} a prompt), which is not a multiple of {name} {divisor}."
            )
        next_multiple = -(-responses // divisor) * divisor
        raise ValueError(f"{batch} is not a multiple of {name} {divisor}; the next one is {next_multiple}.")

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identity of the code of the scoring functions, for the stage's key."""
        from align.config.user_functions import function_identity

        gold = {} if self.gold is None else {"gold": function_identity(self.gold)}
        environment = {} if self.environment is None else {"environment": self.environment.identity()}
        replay = {"replay": self.replay.identity(base)} if isinstance(self.replay, ReplayFolder) else {}
        return score_identities(self.score) | gold | environment | replay
