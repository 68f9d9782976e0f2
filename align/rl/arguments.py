"""Arguments of the trainers that sample: transformers' ``TrainingArguments``, made from a stage's config.

The config (``align.config.stages``) has the settings of the method; scripts make a config with
``PpoConfig.for_trainer(...)``. ``rollout_arguments`` derives the Trainer's counts from it. An *update* is a rollout of
``rollout_batch`` responses and ``num_epochs * num_mini_batches`` optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from align.config.options import OWNED, OWNED_BY_ROLLOUTS
from align.config.runtime.launch import LaunchConfig, world_size
from align.config.stages.policy_gradient import DriftFields, drift_settings
from align.config.stages.rl import RolloutFields
from align.pipeline.context import MemoryGuess
from align.training.arguments import starts_with_recomputation, use_one_device
from align.training.micro_batches import MemorySettings

SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Value of ``scheduler`` -> transformers' name of it."""
FINGERPRINT = (
    "rollout_batch",
    "samples_per_prompt",
    "num_epochs",
    "num_mini_batches",
    "temperature",
    "max_tokens",
    "max_staleness",
)
"""Settings that decide the order of the data. A checkpoint stores them, and a resumed run must have the same."""
DERIVED = frozenset(
    {
        *("learning_rate", "weight_decay", "max_grad_norm", "max_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"),
        "gradient_checkpointing",
    }
)
"""Options of ``TrainingArguments`` that follow from the config."""


@dataclass
class RolloutArguments(TrainingArguments):
    """``TrainingArguments`` and the options that no config has a field for."""

    critic_adam_epsilon: float = field(
        default=1e-8,
        metadata={"help": "AdamW's epsilon for the critic. Gradients below a value head that starts at 0 are tiny."},
    )
    reuse_forward: float = field(
        default=0.0,
        metadata={
            "help": "Share of an update's first mini-batch whose scoring forward pass is reused as its training "
            "forward pass. Its activations stay in memory until then."
        },
    )
    padding_free: bool = field(default=True, metadata={"help": "Skip padding tokens, if the model allows it."})
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

    if TYPE_CHECKING:  # ``rollout_arguments`` sets the first three, a stage the others
        config: RolloutFields = field(init=False)
        drift: DriftFields = field(init=False)
        memory: MemorySettings = field(init=False)
        launch: LaunchConfig = field(init=False)
        precision: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the options. Raises ``ValueError``."""
        super().__post_init__()
        if not 0 <= self.reuse_forward <= 1:
            raise ValueError(f"reuse_forward is {self.reuse_forward}; it is a share of micro-batches, from 0 to 1.")
        if self.reuse_forward and self.world_size > 1:
            raise ValueError("reuse_forward needs a single process: DDP expects one backward pass per forward pass.")

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings that decide the order of the data."""
        sources = (self.config, self.drift)
        settings = {name: next(getattr(s, name) for s in sources if hasattr(s, name)) for name in FINGERPRINT}
        # Checkpoints of runs without a budget lack it.
        budget = self.config.thinking_budget
        settings |= {} if budget is None else {"thinking_budget": budget}
        return {"seed": self.seed, **settings}


def rollout_arguments(
    config: RolloutFields,
    *,
    launch: LaunchConfig | None = None,
    precision: str | None = None,
    guess: MemoryGuess | None = None,
    **options: Any,
) -> RolloutArguments:
    """Return the arguments of a trainer with the settings of ``config``.

    Args:
        config: The settings of the method, such as a ``PpoConfig``. Counts are over all processes together.
        launch: How a stage's processes were launched, if the model may be sharded over them.
        precision: The type that ``config.precision: auto`` stands for here; without it, ``auto`` is float32.
        guess: The plan's choice for the memory, for settings that are ``auto``.
        options: Further options of ``TrainingArguments`` and ``RolloutArguments``, such as ``output_dir``.

    Raises:
        ValueError: for an option that the config decides, and for batches that the processes cannot share.
    """
    for name in sorted(DERIVED & options.keys()):
        remedy = (OWNED | OWNED_BY_ROLLOUTS)[name].replace("next to 'trainer'", "in the config")
        raise ValueError(f"'{name}' is not set here: {remedy}.")
    objection = config.processes_objection(LaunchConfig(processes=world_size()))
    if objection is not None:
        raise ValueError(objection)
    micro_batch = config.micro_batch_of(world_size())
    steps = config.steps_per_update
    derived: dict[str, Any] = {
        "learning_rate": config.peak_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": micro_batch,
        # One optimizer step learns from one mini-batch, so its micro-batches are accumulated.
        "gradient_accumulation_steps": config.responses_per_step // (world_size() * micro_batch),
        "gradient_checkpointing": starts_with_recomputation(config, guess, options),
        "max_steps": config.updates * steps,
        "logging_steps": steps,
        "save_steps": config.save_updates * steps,
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run
        "remove_unused_columns": False,
    }
    defaults: dict[str, Any] = {
        "adam_epsilon": config.adam_epsilon,
        "bf16": (precision or config.precision) == "bfloat16",
        "lr_scheduler_type": SCHEDULERS[config.scheduler],
        "warmup_steps": config.warmup_ratio,
    }
    arguments = use_one_device(RolloutArguments(**(defaults | options | derived)))
    arguments.config = config
    may_recompute = config.gradient_checkpointing == "auto"
    settings = MemorySettings(config.micro_batch_sizes(world_size()), may_recompute, "max_tokens or max_prompt_tokens")
    arguments.memory = settings.up_to(guess)
    if launch is not None:
        arguments.launch = launch
        arguments.precision = precision or config.precision
    arguments.drift = drift_settings(config)
    return arguments
