"""Fields of every stage that trains with trl. Torch-free."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, Precision, PrecisionSetting, stage_input
from align.config.options import TrainerOptions
from align.config.runtime.launch import LaunchConfig
from align.config.stages.continue_from import MEMORY_FIELDS, ChangedStage
from align.config.stages.evaluation.during_training import EarlyStopping, TrainingEvaluation
from align.config.tuning import AdaptersTuning, FullTuning, PeftTuning, QloraTuning, Tuning, TuningBase
from align.config.tuning_blocks import TrainedTokens
from align.store.artifacts import Kind

LearningRate = Literal["auto"] | Annotated[float, Field(gt=0, le=1)]
"""A peak learning rate; ``auto`` is the default of the kind, for the tuning method and the model's size."""
MicroBatchSize = Literal["auto"] | Annotated[int, Field(ge=1)]
Recomputation = Literal["auto"] | bool
LongRows = Literal["refuse", "skip"]
"""Answer to rows that are mostly longer than a limit. It changes no result, so it is in no key."""
SIZES = (2e9, 4e9)
"""Numbers of parameters between which default rates change, along a line in the logarithms of both."""
RATE_SHARES = {
    "full": 0.1,
    **dict.fromkeys(("ia3", "vera", "llama_adapter", "prefix", "prompt"), 7.5),
    "parallel": 2.5,
    "sequential": 0.75,
    "p_tuning": 0.25,
}
"""Tuning method -> default learning rate as a share of LoRA's, which other methods have. Sources: docs/methods.md."""


@dataclass(frozen=True)
class PeakRates:
    """Default learning rates of LoRA for models below 2 and from 4 billion parameters. Sources: docs/methods.md."""

    small: float
    large: float

    def choose(self, tuning: TuningBase, parameters: int) -> float:
        """Return the rate for a tuning method and a model, rounded to two digits."""
        low, high = SIZES
        share = math.log(min(max(parameters, low), high) / low) / math.log(high / low)
        rate = self.small * (self.large / self.small) ** share
        return float(f"{rate * RATE_SHARES.get(_rate_group(tuning), 1.0):.2g}")


def _rate_group(tuning: TuningBase) -> str:
    """Return the name in ``RATE_SHARES`` of a tuning method."""
    if isinstance(tuning, PeftTuning):
        return tuning.type
    if isinstance(tuning, AdaptersTuning):
        return tuning.kind if tuning.kind == "llama_adapter" else tuning.position
    return tuning.method


class DefaultRates(Config):
    """The learning rate of a stage that trains, and its default."""

    rates: ClassVar[PeakRates] = PeakRates(1e-3, 3e-4)
    """Values of ``learning_rate: auto``."""

    if TYPE_CHECKING:  # each family of stages has these fields at their place among its own
        tuning: Tuning = FullTuning()
        precision: PrecisionSetting = "auto"
        learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _check_base_dtype(self) -> Self:
        base_dtype = getattr(self.tuning, "base_dtype", "auto")
        products: Precision = "float32" if self.precision == "float32" else "bfloat16"
        if base_dtype == "bfloat16" and self.tuning.base_type(products) != base_dtype:
            reason = f"init {getattr(self.tuning, 'init', '')} changes the frozen weights"
            if products == "float32":
                reason = "precision is float32, and a frozen matrix has the type of its products"
            raise ValueError(f"tuning.base_dtype is bfloat16, but {reason}. Leave base_dtype out.")
        return self

    @property
    def peak_rate(self) -> float:
        """``learning_rate`` as a number. Raises ``ValueError`` while it is ``auto``."""
        if self.learning_rate == "auto":
            raise ValueError("learning_rate is auto, and the size of the model is not known here; set a number.")
        return self.learning_rate

    def default_rates(self, parameters: int) -> dict[str, float]:
        """Return the fields that are ``auto``, with their values for a model of so many parameters."""
        return {"learning_rate": self.rates.choose(self.tuning, parameters)} if self.learning_rate == "auto" else {}


class Anchor(Config):
    """A penalty that keeps the model near its start, to reduce forgetting."""

    to: Literal["l2", "kl"]
    """``l2`` pulls weights back to their initial values, and needs a copy of them (1802.01483). ``kl`` adds
    KL(start || model) at the answers' tokens to the loss (1606.09282), and needs a second forward pass."""
    weight: float = Field(gt=0)
    """``l2``: decay towards the start per step and unit of learning rate, as in weight_decay. ``kl``: loss per nat."""


class TrainingFields(DefaultRates, TrainerOptions):
    """Settings of training. An optimizer step uses ``batch_size`` rows, whatever the micro-batch."""

    has_vocabulary: ClassVar[bool] = True
    """True if the stage's model has a vocabulary head."""
    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"continue_from", "end_after", "thoughts"})
    refers: ClassVar[bool] = False
    """True if the stage needs a reference's log-probabilities of every row, which are computed once."""
    trainer_class: ClassVar[str] = "transformers.training_args:TrainingArguments"

    tuning: Tuning = FullTuning()
    """``{method: full}`` trains every weight, ``{method: lora, rank: 16}`` adapters of a few per cent."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products, and of frozen matrices below adapters; ``auto`` measures which one this device
    multiplies faster in. Trained weights and AdamW's state are float32 either way."""
    learning_rate: LearningRate = "auto"
    """Peak learning rate of AdamW. ``auto`` follows from the kind, ``tuning`` and the model's size (docs/methods.md);
    the plan shows its value."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training rows; a fraction stops early."""
    max_steps: int | None = Field(None, ge=1)
    """Most optimizer steps; limits ``epochs``."""
    batch_size: int = Field(16, ge=1)
    """Rows (or pairs) per optimizer step."""
    micro_batch_size: MicroBatchSize = "auto"
    """Rows per forward pass; a number must divide ``batch_size``. ``auto`` is at first the largest divisor up to 8, and
    half as many when a step runs out of memory. It changes no result, unless the loss compares a micro-batch's rows."""
    max_length: int = Field(1024, ge=8)
    """Most tokens per row; longer rows are cut (SFT) or dropped (pairs), counted and reported."""
    long_rows: LongRows = "refuse"
    """``refuse`` ends the stage before training if more than half of the rows are longer than ``max_length``."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0; with too little the loss may diverge at first."""
    scheduler: Literal["constant", "linear", "cosine", "cosine_with_min_lr", "wsd", "inverse_sqrt"] = "cosine"
    """Learning rate after the warm-up: constant; linear or half a cosine to 0; half a cosine to ``min_lr_ratio``.
    ``wsd`` is constant, then linear over the last ``decay_ratio`` of the steps (2404.06395). ``inverse_sqrt`` falls
    with the square root of the steps, never to 0."""
    min_lr_ratio: float | None = Field(None, ge=0, lt=1)
    """Final learning rate of ``cosine_with_min_lr`` (0.1 by default) and ``wsd`` (0), as a share of the peak."""
    decay_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of the steps over which ``wsd`` decays the learning rate."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay of AdamW, per unit of learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm; lower it when the loss spikes."""
    gradient_checkpointing: Recomputation = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time, and the same result. ``auto``
    does so once a micro-batch of one row runs out of memory."""
    early_stopping: EarlyStopping | None = None
    """Stop when the validation loss no longer falls: ``{patience: 3}``; needs ``eval_steps``. Same rows as ``keep``."""
    keep: Literal["last", "best"] = "last"
    """Weights to keep: the last, or the weights with the lowest validation loss (needs ``eval_steps``, and a copy of
    the trained weights on disk) or the best ``evaluate.best_metric``. Validation rows come from the ``train`` split by
    question, at most ``eval_rows`` and a fifth of the questions and rows; they are not trained on. The reported
    ``test`` split has no part in the choice."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential average of the trained weights, 0.999 or less for short runs; the average is saved."""
    anchor: Anchor | None = None
    """Keep the model near its start: ``{to: l2, weight: 0.1}`` or ``{to: kl, weight: 0.1}``."""
    replay: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Stage with general data to train on as well, to reduce forgetting; its test rows are scored. Not for a
    partitioned model (fsdp2, deepspeed)."""
    replay_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of replayed rows in an optimizer step, in addition to ``batch_size``; 0 only scores the test rows."""
    replay_weight: float | None = Field(None, gt=0)
    """Weight of the replayed answers' loss per token; by default fraction / (1 - fraction), as if rows were mixed."""
    continue_from: stage_input(Kind.POLICY, Kind.REWARD) | ChangedStage | None = None  # type: ignore[valid-type]
    """Finished stage of the same kind to continue from, with its weights, optimizer, schedule and position in the rows.
    Fields that are not set, including ``seed``, are that stage's. ``max_steps`` and ``epochs`` count from its start.
    ``{stage: sft, change: {learning_rate: 1.0e-5}}`` continues with other settings."""
    end_after: int | None = Field(None, ge=1)
    """Steps after which the stage ends, with the schedule of its full length. ``at`` of a stage that continues this
    stage sets it."""
    save_steps: int = Field(50, ge=1)
    """Steps between checkpoints; a killed stage repeats at most these. Full tuning writes 12 bytes per weight."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations on the held-out rows (with ``keep: best`` or early stopping, on the
    validation rows); by default only before and after training."""
    eval_rows: int = Field(512, ge=1)
    """Most held-out rows of a split to evaluate; fewer are faster and less certain."""
    evaluate: TrainingEvaluation | None = None
    """Tasks of `align eval` to run during training: ``{every: 50, tasks: {gsm8k: {files: [dev.jsonl]}}}``."""
    max_rows: int | None = Field(None, ge=1)
    """Use only the first rows of the training data; for trials."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Options for trl's config class, such as ``{adam_beta2: 0.95}``; checked against it."""

    @property
    def chooses(self) -> bool:
        """True if scores during training decide which weights are kept, or when training stops."""
        return self.early_stopping is not None or self.keep == "best"

    @property
    def best_metric(self) -> str | None:
        """The task's metric that decides instead of the validation loss, if any."""
        return None if self.evaluate is None else self.evaluate.best_metric

    @property
    def holds_back(self) -> bool:
        """True if rows of the ``train`` split are validation rows, which are not trained on."""
        reads_pairs = self.evaluate is not None and self.evaluate.reads_stage_pairs
        return reads_pairs or (self.chooses and self.best_metric is None)

    def fields_outside_key(self) -> set[str]:
        """Return ``identified``, fields that change no result, and ``evaluate``, which has identities."""
        memory = MEMORY_FIELDS if self.rows_add_up else MEMORY_FIELDS - {"micro_batch_size"}
        return {*super().fields_outside_key(), "long_rows", "evaluate", *memory}

    @property
    def sides(self) -> int:
        """Token sequences per row."""
        return 1

    @property
    def micro_batch(self) -> int:
        """Rows per forward pass, unless memory runs out."""
        return self._divisor_up_to(8) if self.micro_batch_size == "auto" else self.micro_batch_size

    def _divisor_up_to(self, most: int) -> int:
        return max(size for size in range(1, most + 1) if self.batch_size % size == 0)

    @property
    def row_group(self) -> int:
        """Rows of similar length that follow each other. The order of rows depends on no micro-batch that may vary."""
        return self._divisor_up_to(16) if self.rows_add_up else self.micro_batch

    @property
    def rows_add_up(self) -> bool:
        """True if a step's loss does not depend on the micro-batches in which its rows are computed."""
        return True

    @property
    def recomputes(self) -> bool:
        """True if activations are recomputed from the first step on."""
        return self.gradient_checkpointing is True

    def micro_batch_of(self, processes: int) -> int:
        """Return the rows per forward pass of each of several processes: ``micro_batch``, or less if none was set."""
        if self.batch_size % (self.micro_batch * processes) == 0 or self.micro_batch_size != "auto":
            return self.micro_batch
        return math.gcd(self.batch_size // processes or 1, self.micro_batch)

    def micro_batch_sizes(self, processes: int) -> tuple[int, ...]:
        """Return the rows per forward pass of each process: the first size, and those to try if memory runs out."""
        size = self.micro_batch_of(processes)
        if self.micro_batch_size != "auto" or not self.rows_add_up:
            return (size,)
        return tuple(size >> halvings for halvings in range(size.bit_length()))

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """Return why the processes cannot split an optimizer step's rows or the model, with a remedy; None if they
        can."""
        return (
            self._batch_objection(launch.known or 1)
            or sharding_objection(launch, self.tuning, looks_back=self.anchor is not None and self.anchor.to == "kl")
            or self._strategy_objection(launch)
            or (None if self.evaluate is None else self.evaluate.launch_objection(launch))
        )

    def _strategy_objection(self, launch: LaunchConfig) -> str | None:
        """Name a setting that does not go with the strategy, and the remedy; None if all do."""
        if launch.strategy == "ddp" or launch.known == 1:
            return None
        if self.replay is not None:
            # Passes through only the trunk gather no weights, and a process without replayed rows makes no such pass.
            return f"replay does not go with strategy {launch.strategy}; take ddp, or leave it out."
        if launch.strategy == "fsdp2":
            return None
        # These change weights outside DeepSpeed's engine, which has its own copies of them.
        settings = {"ema": self.ema, "anchor": self.anchor, "keep: best": self.keep == "best" or None}
        for name, value in settings.items():
            if value is not None:
                return f"{name} does not go with strategy deepspeed; take fsdp2, or leave it out."
        return None

    def _batch_objection(self, processes: int) -> str | None:
        if self.batch_size % processes:
            divisor = max(count for count in range(1, processes + 1) if self.batch_size % count == 0)
            return (
                f"batch_size {self.batch_size} counts the rows of all processes together and is not a multiple of "
                f"{processes}; take {divisor} processes, or another batch_size."
            )
        fits = self.batch_size % (self.micro_batch * processes) == 0
        if not fits and (self.micro_batch_size != "auto" or not self.rows_add_up):
            size = math.gcd(self.batch_size // processes, self.micro_batch)
            effect = "" if self.rows_add_up else ", which changes the loss and so the key"
            return (
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch} times "
                f"{processes} processes; take micro_batch_size: {size}{effect}."
            )
        return None

    @model_validator(mode="after")
    def _check_replay(self) -> Self:
        changed = self.changed("replay_fraction", "replay_weight")
        if self.replay is None and changed:
            raise ValueError(f"{changed[0]} needs a `replay:` stage to replay from, and there is none.")
        if self.replay_fraction == 0 and self.replay_weight is not None:
            raise ValueError("replay_weight has no effect at replay_fraction 0; leave it out.")
        return self

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        if not self.has_vocabulary and self.replay is not None:
            raise ValueError(
                "replay trains on answers token by token, which a reward model cannot; mix pairs in the data."
            )
        if not self.has_vocabulary and self.anchor is not None and self.anchor.to == "kl":
            raise ValueError("anchor: kl needs distributions over tokens, and a reward model has none; set `to: l2`.")
        return self

    @model_validator(mode="after")
    def _check_kl_anchor(self) -> Self:
        if self.anchor is not None and self.anchor.to == "kl" and self.tuning.input_only:
            raise ValueError(f"anchor: kl does not go with {self.tuning.method}, which changes every input; take l2.")
        trains_tokens = isinstance(self.tuning, TrainedTokens) and bool(self.tuning.train_tokens)
        if self.anchor is not None and self.anchor.to == "kl" and trains_tokens:
            raise ValueError(
                "anchor: kl does not go with tuning.train_tokens, which trains rows of the head that the start needs; "
                "take `to: l2`, or leave train_tokens out."
            )
        return self

    @model_validator(mode="after")
    def _check_eval_steps(self) -> Self:
        setting = "early_stopping" if self.early_stopping is not None else "keep: best"
        if self.best_metric is not None and not self.chooses:
            raise ValueError("evaluate.best_metric has no effect without `keep: best` or early_stopping; set one.")
        if self.eval_steps is None and self.chooses and self.best_metric is None:
            raise ValueError(
                f"{setting} needs the validation loss during training; set eval_steps, such as eval_steps: 20."
            )
        return self

    @model_validator(mode="after")
    def _check_evaluate(self) -> Self:
        if self.evaluate is None:
            return self
        objection = self.evaluate.model_objection(
            has_vocabulary=self.has_vocabulary, has_pairs=True, tuning=self.tuning
        )
        if objection is not None:
            raise ValueError(f"evaluate.{objection}")
        return self

    @model_validator(mode="after")
    def _check_scheduler(self) -> Self:
        if self.min_lr_ratio is not None and self.scheduler not in ("cosine_with_min_lr", "wsd"):
            raise ValueError(
                f"min_lr_ratio has no effect with scheduler {self.scheduler}; take cosine_with_min_lr or wsd."
            )
        if self.scheduler != "wsd" and self.changed("decay_ratio"):
            raise ValueError(f"decay_ratio has no effect with scheduler {self.scheduler}; take wsd.")
        if self.scheduler == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio:g} and decay_ratio {self.decay_ratio:g} add up to more than all "
                "steps; lower one."
            )
        return self

    @model_validator(mode="after")
    def _check_micro_batch_size(self) -> Self:
        if self.batch_size % self.micro_batch:
            divisor = max(size for size in range(1, self.micro_batch + 1) if self.batch_size % size == 0)
            raise ValueError(
                f"micro_batch_size {self.micro_batch} does not divide batch_size {self.batch_size}; take {divisor}."
            )
        return self


def sharding_objection(launch: LaunchConfig, tuning: TuningBase, *, looks_back: bool) -> str | None:
    """Return why a model with this tuning cannot be sharded, with a remedy; None if it can.

    ``looks_back``: the stage compares the model with its start during training.
    """
    if launch.strategy == "ddp" or launch.known == 1:
        return None
    reason = None
    if isinstance(tuning, QloraTuning):
        reason = "tuning qlora keeps weights in 4 bits, which"
    elif isinstance(tuning, FullTuning) and tuning.scheduled:
        reason = "tuning.unfreeze and lisa freeze and unfreeze weights during training, which"
    if reason is not None:
        return f"{reason} strategy {launch.strategy} cannot shard; take ddp."
    # Only strategies that shard weights lose the initial policy; with ZeRO-1 and 2 every device has it.
    gathers = launch.strategy == "fsdp2" or launch.deepspeed.stage == 3
    if looks_back and gathers and tuning.starts_from_weights:
        return (
            "tuning.init makes the adapters a part of the initial policy, which this stage needs and strategy "
            f"{launch.strategy} cannot restore; take ddp, or another init."
        )
    if launch.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return "strategy deepspeed needs the package deepspeed; install the extra `deepspeed`, or take fsdp2."
    return None
