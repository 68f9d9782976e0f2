"""Fields shared by the stages that train with trl. Torch-free."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.config.launch import LaunchConfig
from align.config.trl_options import check_trainer_options
from align.config.tuning import FullTuning, QloraTuning, Tuning, TuningBase
from align.store.artifacts import Kind


class Anchor(Config):
    """What holds the model near its start, so that it forgets less."""

    to: Literal["l2", "kl"]
    """``l2`` pulls weights back to their first values, at the cost of a copy of them (1802.01483). ``kl`` adds
    KL(start || model) at the answers' tokens to the loss (1606.09282), at the cost of a second forward pass."""
    weight: float = Field(gt=0)
    """``l2``: share of the way back per step and unit of learning rate, as weight_decay's. ``kl``: price of a nat."""


class EarlyStopping(Config):
    """When to stop before the last step, by the loss on the validation rows."""

    patience: int = Field(3, ge=1)
    """Scorings in a row, ``eval_steps`` apart, that may be no better than the best."""
    min_improvement: float = Field(0.0, ge=0)
    """By how much a loss must be lower to count as better."""


class TrainingFields(Config):
    """How weights are fitted: one optimizer step sees ``batch_size`` rows, whatever the micro-batch."""

    has_vocabulary: ClassVar[bool] = True
    """Whether the stage's model has distributions over tokens."""
    refers: ClassVar[bool] = False
    """Whether another model's log-probabilities of every row are needed, which are computed once."""

    tuning: Tuning = FullTuning()
    """``{method: full}`` trains every weight, ``{method: lora, rank: 16}`` a few per cent of them."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products, bfloat16 twice as fast; weights and AdamW's state are float32 either way."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak step size of AdamW. LoRA wants some ten times what full tuning wants, so there is no default."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training rows; a fraction stops early."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps at most; takes precedence over ``epochs`` when that would give more."""
    batch_size: int = Field(16, ge=1)
    """Rows (or pairs) per optimizer step. Larger is smoother and slower per step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows in memory at once; must divide ``batch_size``. By default the largest divisor up to 8."""
    max_length: int = Field(1024, ge=8)
    """Tokens per row at most; longer rows are cut (SFT) or left out (pairs), counted and warned of."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0; too little warm-up can blow up the first steps."""
    scheduler: Literal["constant", "linear", "cosine", "cosine_with_min_lr", "wsd", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up: not at all, to 0 along a line or a half cosine, along one to
    ``min_lr_ratio``; ``wsd`` holds it, and it falls along a line in the last ``decay_ratio`` of the steps (2404.06395);
    ``inverse_sqrt`` falls with the square root of the steps, never to 0."""
    min_lr_ratio: float | None = Field(None, ge=0, lt=1)
    """Where ``cosine_with_min_lr`` (0.1 by default) and ``wsd`` (0) end, as a share of ``learning_rate``."""
    decay_ratio: float = Field(0.2, gt=0, lt=1)
    """Share of the steps in which ``wsd`` lets the learning rate fall."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay of AdamW per unit of learning rate; pulls weights towards 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; lower it when the loss spikes."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory for about a third more time."""
    early_stopping: EarlyStopping | None = None
    """Stop when the validation loss no longer falls: ``{patience: 3}``; needs ``eval_steps``. Rows as for ``keep``."""
    keep: Literal["last", "best"] = "last"
    """Which weights are the result: the last, or those with the lowest validation loss (needs ``eval_steps``, and a
    copy of what is trained on the disk). Validation rows come out of the ``train`` split, whole questions, at most
    ``eval_rows`` and a fifth of the questions and rows; they are not learned from. The ``test`` split, which is
    reported on, has no part in the choice."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the trained weights, 0.999 or less for short runs; it is what is scored and saved."""
    anchor: Anchor | None = None
    """Hold the model near its start: ``{to: l2, weight: 0.1}`` or ``{to: kl, weight: 0.1}``."""
    replay: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES) | None = None  # type: ignore[valid-type]
    """Stage with general data, learned beside the stage's own so that less is forgotten; its test rows are scored."""
    replay_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the rows of an optimizer step that are replayed, beside ``batch_size``; 0 only scores the test rows."""
    replay_weight: float | None = Field(None, gt=0)
    """Price of the replayed answers' loss per token; by default fraction / (1 - fraction), as if rows were mixed."""
    save_steps: int = Field(50, ge=1)
    """Steps between checkpoints, what a killed stage repeats at most; full tuning writes 12 bytes per weight."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between scorings of the held-out rows (the validation rows, where a checkpoint is chosen); by
    default only before and after training."""
    eval_rows: int = Field(512, ge=1)
    """Held-out rows of a split scored at most; fewer is faster and less certain."""
    max_rows: int | None = Field(None, ge=1)
    """Training rows used at most, the first ones; for trials."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Options passed to trl's config class as they are, such as ``{adam_beta2: 0.95}``; checked against it."""

    @property
    def chooses(self) -> bool:
        """Whether a loss on held-out rows decides which weights are the result, or when training stops."""
        return self.early_stopping is not None or self.keep == "best"

    @property
    def sides(self) -> int:
        """Token sequences of a row."""
        return 1

    @property
    def micro_batch(self) -> int:
        """Rows in memory at once."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max(size for size in range(1, 9) if self.batch_size % size == 0)

    @property
    def rows_add_up(self) -> bool:
        """Whether a micro-batch's loss is the mean of its rows' own, so that half of it can be another process's."""
        return True

    def micro_batch_of(self, processes: int) -> int:
        """Rows in memory at once in each of several processes: ``micro_batch``, or a part of it where none was set."""
        if self.batch_size % (self.micro_batch * processes) == 0 or self.micro_batch_size is not None:
            return self.micro_batch
        return math.gcd(self.batch_size // processes or 1, self.micro_batch)

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """Why the processes cannot share an optimizer step's rows, or hold the model, and what to do."""
        return (
            self._batch_objection(launch.known or 1)
            or sharding_objection(launch, self.tuning, looks_back=self.anchor is not None and self.anchor.to == "kl")
            or (self._zero_objection() if launch.strategy == "deepspeed" and launch.known != 1 else None)
        )

    def _zero_objection(self) -> str | None:
        """What reads or moves weights beside DeepSpeed's engine, which keeps copies of its own."""
        asked = {"ema": self.ema, "anchor": self.anchor, "replay": self.replay}
        asked["keep: best"] = self.keep == "best" or None
        names = [name for name, value in asked.items() if value is not None]
        return f"{names[0]} does not go with strategy deepspeed; take fsdp2, or leave it out." if names else None

    def _batch_objection(self, processes: int) -> str | None:
        if self.batch_size % processes:
            most = max(n for n in range(1, processes + 1) if self.batch_size % n == 0)
            return (
                f"batch_size {self.batch_size} counts the rows of all processes together and is not a multiple of "
                f"{processes}; take {most} processes, or another batch_size."
            )
        fits = self.batch_size % (self.micro_batch * processes) == 0
        if not fits and (self.micro_batch_size is not None or not self.rows_add_up):
            size = math.gcd(self.batch_size // processes, self.micro_batch)
            return (
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch} times "
                f"{processes} processes; take micro_batch_size: {size}, which is another order of the rows and so "
                "another key."
            )
        return None

    @model_validator(mode="after")
    def _replay_settings_need_its_data(self) -> Self:
        # Not model_fields_set: a stage's process is given its resolved config, in which every field is set.
        fields = {name: type(self).model_fields[name].default for name in ("replay_fraction", "replay_weight")}
        beside = {name for name, default in fields.items() if getattr(self, name) != default}
        if self.replay is None and beside:
            raise ValueError(f"{sorted(beside)[0]} says how to replay, but there is no `replay:` stage to replay from.")
        if self.replay_fraction == 0 and self.replay_weight is not None:
            raise ValueError("replay_weight has nothing to weigh at replay_fraction 0; leave it out.")
        return self

    @model_validator(mode="after")
    def _a_vocabulary_where_it_is_needed(self) -> Self:
        if not self.has_vocabulary and self.replay is not None:
            raise ValueError("replay learns answers word by word, which a reward model cannot; mix pairs in the data.")
        if not self.has_vocabulary and self.anchor is not None and self.anchor.to == "kl":
            raise ValueError("anchor: kl holds a model's distributions, and a reward model has none; take `to: l2`.")
        return self

    @model_validator(mode="after")
    def _kl_needs_a_start_to_switch_to(self) -> Self:
        if self.anchor is not None and self.anchor.to == "kl" and self.tuning.input_only:
            raise ValueError(f"anchor: kl does not go with {self.tuning.method}, which changes every input; take l2.")
        return self

    @model_validator(mode="after")
    def _scored_on_the_way(self) -> Self:
        asked = "early_stopping" if self.early_stopping is not None else "keep: best"
        if self.eval_steps is None and self.chooses:
            raise ValueError(f"{asked} goes by the held-out loss on the way; set eval_steps, such as eval_steps: 20.")
        return self

    @model_validator(mode="after")
    def _schedule_has_its_shape(self) -> Self:
        if self.min_lr_ratio is not None and self.scheduler not in ("cosine_with_min_lr", "wsd"):
            raise ValueError(
                f"min_lr_ratio means nothing to scheduler {self.scheduler}; take cosine_with_min_lr or wsd."
            )
        if self.scheduler == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio:g} and decay_ratio {self.decay_ratio:g} are more than all steps; "
                "lower one."
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch_size {self.micro_batch} does not divide batch_size {self.batch_size}; "
                f"take {max(n for n in range(1, self.micro_batch + 1) if self.batch_size % n == 0)}."
            )
        return self


def sharding_objection(launch: LaunchConfig, tuning: TuningBase, *, looks_back: bool) -> str | None:
    """Why a model with this tuning cannot be shared out in parts, and what to do.

    ``looks_back``: the stage measures how far the model has gone from its start, while it trains.
    """
    if launch.strategy == "ddp" or launch.known == 1:
        return None
    what = "tuning qlora keeps weights in 4 bits, which" if isinstance(tuning, QloraTuning) else None
    if isinstance(tuning, FullTuning) and tuning.scheduled:
        what = "tuning.unfreeze and lisa open and close weights on the way, which"
    if what is not None:
        return f"{what} strategy {launch.strategy} cannot share out; take ddp."
    gathers = launch.strategy == "fsdp2" or launch.deepspeed.stage == 3
    if looks_back and gathers and tuning.starts_from_weights:
        return (
            "tuning.init makes the adapters a part of the start, which this stage looks back to and strategy "
            f"{launch.strategy} cannot put back; take ddp, or another init."
        )
    if launch.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return "strategy deepspeed needs the package deepspeed; install the extra `deepspeed`, or take fsdp2."
    return None


def checked_options(kind: str, options: dict[str, Any], reserved: Iterable[str] = ()) -> dict[str, Any]:
    """For a ``trainer`` validator: the options as given, or ``ValueError`` (see ``check_trainer_options``)."""
    check_trainer_options(kind, options, {*reserved, "gradient_checkpointing"})
    return options
