"""Arguments of the trainers: transformers' ``TrainingArguments`` and the settings of a stage.

The settings are described once, in ``align.config.stages``. ``argument_fields`` makes dataclasses of them, and the
arguments inherit from those. Written out here is only what a stage has no field for.

One *update* is a rollout of ``rollout_batch`` responses and ``num_epochs * num_mini_batches`` optimizer steps.
``per_device_train_batch_size`` is the micro-batch in responses. Accumulation and ``max_steps`` follow from these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError
from transformers import TrainingArguments

from align.config.environment import EnvironmentConfig
from align.config.launch import LaunchConfig
from align.config.stages.grpo import PRESETS, Preset, Scale
from align.config.stages.rl import RolloutFields, trainer_fields
from align.rl.argument_fields import (
    DriftArguments,
    GrpoArguments,
    OnlineDpoArguments,
    PpoArguments,
    RejectionArguments,
    RlooArguments,
)
from align.training.arguments import use_one_device

FINGERPRINT = (
    "seed",
    "rollout_batch",
    "samples_per_prompt",
    "num_epochs",
    "num_mini_batches",
    "temperature",
    "max_tokens",
    "max_staleness",
)
"""Arguments that decide the order of the data. A checkpoint stores them, and a resumed run must have the same."""


@dataclass
class RolloutArguments(DriftArguments, TrainingArguments):
    """Arguments of every trainer that samples. Counts are over all processes together."""

    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW's epsilon for the policy; usual for PPO."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "See TrainingArguments."})
    reuse_forward: float = field(
        default=0.0,
        metadata={
            "help": "Share of an update's first mini-batch whose scoring forward pass is reused as its training "
            "forward pass. Its activations stay in memory until then."
        },
    )
    padding_free: bool = field(default=True, metadata={"help": "Skip padding tokens, where the model allows."})
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Compute a prompt once for all its responses, and a prefix once for all prompts that begin with "
            "it. Needs padding_free."
        },
    )
    probe_parity: bool = field(
        default=True, metadata={"help": "Check at start and resume that engine and trainer agree."}
    )

    default_loss_estimator: ClassVar[Literal["k2", "k3"]] = "k2"
    """KL estimator in the loss where ``kl_estimator`` is not set."""
    has_importance_weights: ClassVar[bool] = True
    """True where the loss weights tokens by the ratio of the trainer's to the sampler's probability."""

    if TYPE_CHECKING:  # a stage sets them
        launch: LaunchConfig = field(init=False)
        precision: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the settings and derive the Trainer's counts. Raises ``ValueError`` for what the stage would refuse."""
        self._check_settings()
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run
        self.remove_unused_columns = False
        self.ignore_data_skip = True  # the position in the data follows from the update
        super().__post_init__()
        use_one_device(self)
        self._check()
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else self.default_loss_estimator
        micro_batches = self.num_mini_batches * self.per_device_train_batch_size
        # One optimizer step learns from one mini-batch, so its micro-batches are accumulated.
        self.gradient_accumulation_steps = self.local_responses // micro_batches
        self.max_steps = self.updates * self.steps_per_update
        self.logging_steps = self.steps_per_update
        self.save_steps = self.save_updates * self.steps_per_update

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps between two rollouts."""
        return int(self.num_epochs * self.num_mini_batches)

    @property
    def prompts_per_update(self) -> int:
        """Prompts of a rollout, over all processes."""
        return int(self.rollout_batch // self.samples_per_prompt)

    @property
    def learned_per_prompt(self) -> int:
        """Responses per prompt that the policy learns from; all of them unless a method selects some."""
        return int(self.samples_per_prompt)

    @property
    def local_responses(self) -> int:
        """Responses per update that this process learns from."""
        return self.prompts_per_update * self.learned_per_prompt // int(self.world_size)

    def _check_settings(self) -> None:
        """Raise ``ValueError`` where a stage's config would refuse the values of its fields."""
        checked: set[str] = set()
        for settings in stage_configs(type(self)):
            # The most special settings come first. The others check only fields that are still unchecked.
            names = trainer_fields(settings).keys() - checked
            if not names:
                continue
            checked |= names
            values = {name: getattr(self, name) for name in names}
            # What no script has: any name stands for the stage or function that a pipeline would name.
            values |= {"policy": "policy", "prompts": "prompts", "score": "scorer", "gold": "gold"}
            values["learning_rate"] = self.learning_rate
            if self.ptx_coef and "ptx_coef" in names:
                values["ptx"] = "ptx"
            if "in_flight" in names and self.in_flight == "continue":
                # The trainer gets the player of episodes itself, and checks that there is one.
                values["environment"] = EnvironmentConfig(verifiers="any", max_turns=1, max_tokens=self.max_tokens)
            try:
                settings(**values)
            except ValidationError as error:
                raise ValueError("\n".join(_refusal(detail) for detail in error.errors())) from None

    def _check(self) -> None:
        """Raise ``ValueError`` for what depends on the processes, or on arguments that are no stage's field."""
        divisor = self.num_mini_batches * self.per_device_train_batch_size * self.world_size
        learned = self.prompts_per_update * self.learned_per_prompt
        if learned % divisor:
            learned_part = ""
            if learned != self.rollout_batch:
                learned_part = f", of which {learned} responses are learned from,"
            raise ValueError(
                f"rollout_batch {self.rollout_batch}{learned_part} is not a multiple of num_mini_batches "
                f"{self.num_mini_batches} x per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"{self.world_size} processes."
            )
        if self.max_staleness and not self.has_importance_weights:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, so older weights sample. The loss of this method has no "
                "importance weights to correct for that. Set max_staleness to 0."
            )
        if not 0 <= self.reuse_forward <= 1:
            raise ValueError(f"reuse_forward is {self.reuse_forward}; it is a share of micro-batches, from 0 to 1.")
        if self.reuse_forward and self.world_size > 1:
            raise ValueError("reuse_forward needs a single process: DDP expects one backward pass per forward pass.")

    def fingerprint(self) -> dict[str, Any]:
        """Return the arguments that decide the order of the data."""
        return {name: getattr(self, name) for name in FINGERPRINT}


def stage_configs(cls: type[Any]) -> Iterator[type[RolloutFields]]:
    """Yield the configs that a class's fields come from, the most special first."""
    for base in cls.__mro__:
        config = vars(base).get("stage_config")
        if config is not None:
            yield config


def _refusal(detail: Any) -> str:
    """Return one error of pydantic as a sentence about an argument."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = ".".join(map(str, detail["loc"]))
    return f"{name} is {detail['input']!r}; it {message.removeprefix('Input ')}."


@dataclass
class PPOConfig(PpoArguments, RolloutArguments):
    """Arguments of ``PPOTrainer``: the fields of stage ``ppo``. Counts are over all processes together."""

    critic_adam_epsilon: float = field(
        default=1e-8,
        metadata={"help": "AdamW's epsilon for the critic. Gradients below a value head that starts at 0 are tiny."},
    )


@dataclass
class GRPOConfig(GrpoArguments, RolloutArguments):
    """Arguments of ``GRPOTrainer``: the fields of stage ``grpo``. Counts are over all processes together."""

    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    default_loss_estimator: ClassVar[Literal["k2", "k3"]] = "k3"

    @property
    def preset(self) -> Preset:
        """Parts of the loss variant."""
        return PRESETS[self.loss]

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1. A ``clip_range`` set alone applies to both."""
        low = self.preset.clip_range if self.clip_range is None else self.clip_range
        high = self.clip_range_high
        if high is None and (self.clip_range is None or not self.preset.clips):
            high = self.preset.clip_range_high
        return low, low if high is None else high

    @property
    def scale(self) -> Scale:
        """``scale_rewards``, or the default of the loss variant."""
        return self.scale_rewards or self.preset.scale_rewards


@dataclass
class RLOOConfig(RlooArguments, RolloutArguments):
    """Arguments of ``RLOOTrainer``: the fields of stage ``rloo``. Counts are over all processes together."""

    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high


@dataclass
class OnlineDPOConfig(OnlineDpoArguments, RolloutArguments):
    """Arguments of ``OnlineDPOTrainer``: the fields of stage ``online_dpo``, and those of ``RolloutArguments``."""

    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    has_importance_weights: ClassVar[bool] = False

    @property
    def learned_per_prompt(self) -> int:
        """The best and the worst."""
        return 2

    def _check(self) -> None:
        super()._check()
        if self.per_device_train_batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}; the two responses of a pair share "
                "a micro-batch, so it must be even."
            )


@dataclass
class BestOfNConfig(RejectionArguments, RolloutArguments):
    """Arguments of ``BestOfNTrainer``: the fields of stage ``rejection``, and those of ``RolloutArguments``."""

    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    has_importance_weights: ClassVar[bool] = False

    @property
    def learned_per_prompt(self) -> int:
        """The best of a prompt's responses."""
        return int(self.best)

    def threshold_of(self, update: int) -> float | None:
        """Return the minimum score in a round; the last one of a list stays."""
        threshold: float | list[float] | None = self.threshold
        if not isinstance(threshold, list):
            return threshold
        return threshold[min(update, len(threshold) - 1)]
