"""Create trl's config object from a stage's config: the options that all training stages share."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from align.config.runtime.launch import LaunchConfig, world_size
from align.config.stages.continue_from import warmup_steps
from align.config.stages.rl import RolloutFields
from align.config.stages.training import TrainingFields
from align.errors import UserError
from align.models.compute.processes import device_of
from align.patches import transformers
from align.pipeline.context import MemoryGuess, StageContext
from align.training.kept_state import continued_facts
from align.training.micro_batches import MemorySettings
from align.training.tracking import tracking_options

T = TypeVar("T")

SCHEDULERS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine_with_min_lr",
    "wsd": "warmup_stable_decay",
    "inverse_sqrt": "inverse_sqrt",
}
"""align's scheduler names -> transformers'."""
MIN_LR_RATIO = 0.1
"""Default final share of the learning rate for a cosine with a floor (Chinchilla's tenth, arXiv 2203.15556)."""

ROUTER_LOSS = "router_aux_loss_coef"
"""Option of trl's trainers: the weight of a mixture's load-balancing loss; None means the weight in the config."""
PAGED = dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "paged_adamw_8bit")
"""transformers' names of optimizers whose state bitsandbytes can page, with equal results -> names with paged state."""
NEEDS_PADDING = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "neftune_noise_alpha")
"""Options of trainers that turn ``runtime.shared_prefixes`` off."""


def total_steps(stage: str, fields: TrainingFields, rows: int) -> int:
    """Return the optimizer steps of the run as transformers counts them: an epoch's short last batch is a step.

    Raises ``UserError`` for a ``batch_size`` that leaves a rest.
    """
    objection = fields.processes_objection(LaunchConfig(processes=world_size()))
    if objection is not None:
        raise UserError(f"{stage}: {objection}")
    per_epoch = math.ceil(rows / fields.batch_size)
    steps = math.ceil(fields.epochs * per_epoch)
    return steps if fields.max_steps is None else min(steps, fields.max_steps)


def decay_steps(fields: TrainingFields, steps: int) -> int:
    """Return the steps over which ``wsd`` decays in a run of ``steps`` steps."""
    return max(1, round(fields.decay_ratio * steps))


def schedule_options(fields: TrainingFields, steps: int) -> dict[str, Any]:
    """Return ``lr_scheduler_kwargs`` for a run of ``steps`` steps."""
    if fields.scheduler == "cosine_with_min_lr":
        return {"min_lr_rate": MIN_LR_RATIO if fields.min_lr_ratio is None else fields.min_lr_ratio}
    if fields.scheduler == "wsd":
        return {
            "num_decay_steps": decay_steps(fields, steps),
            "decay_type": "linear",
            "min_lr_ratio": fields.min_lr_ratio or 0.0,
        }
    return {}


def _warmup_steps(context: StageContext, steps: int) -> int:
    """Return the number of warm-up steps. A stage that continues another has the other stage's number."""
    continued = continued_facts(context)
    return warmup_steps(context.config, steps) if continued is None else continued.warmup_steps


def parallel_options(context: StageContext, on_gpu: bool) -> dict[str, Any]:
    """Return the options of ``runtime.launch``'s strategy if several processes train."""
    launch = context.runtime.launch
    if launch.strategy != "deepspeed" or world_size() == 1:
        return {}
    from align.training.zero import zero_options

    return zero_options(launch.deepspeed, on_gpu, context.precision == "bfloat16")


def offload_options(context: StageContext, on_gpu: bool) -> dict[str, Any]:
    """Return the trainer's options for what ``runtime.offload`` keeps in the machine's memory; empty on a CPU.

    Raises ``UserError`` for the state of an optimizer that cannot be paged.
    """
    parts = context.runtime.offload if on_gpu else ()
    trainer: dict[str, Any] = context.config.trainer
    options: dict[str, Any] = {}
    optim = trainer.get("optim", "adamw_torch")
    if "optimizer" in parts and "paged" not in optim:
        if optim not in PAGED:
            raise UserError(
                f"{context.name}: runtime.offload names optimizer, and {optim} has no paged state. Set `trainer: "
                "{optim: adamw_8bit}`, which is bitsandbytes' AdamW, or remove it from offload."
            )
        options["optim"] = PAGED[optim]
    if "activations" in parts:
        checkpointing = trainer.get("gradient_checkpointing_kwargs") or {}
        options["gradient_checkpointing_kwargs"] = {**checkpointing, "offload": True}
    return options


def training_arguments(config_class: type[Any], context: StageContext, rows: int, **stage_options: Any) -> Any:
    """Create trl's ``config_class`` for ``rows`` training rows; ``stage_options`` are the stage's own options.

    Weights stay float32: ``bf16`` means autocast, and the stage passes a loaded model to trl.
    """
    fields: TrainingFields = context.config
    steps = total_steps(context.name, fields, rows)
    on_gpu = device_of(context.runtime).type == "cuda"
    options: dict[str, Any] = {
        "output_dir": str(context.checkpoints),
        "seed": context.seed % 2**32,  # numpy's largest seed
        "use_cpu": not on_gpu,
        "bf16": context.precision == "bfloat16",
        "max_steps": steps,
        # A step's rows come at once, and ``align.training.micro_batches`` cuts them into micro-batches.
        "per_device_train_batch_size": fields.batch_size // world_size(),
        "per_device_eval_batch_size": fields.micro_batch_of(world_size()),
        "gradient_accumulation_steps": 1,
        "ddp_timeout": math.ceil(context.runtime.launch.timeout),
        "learning_rate": fields.peak_rate,
        "lr_scheduler_type": SCHEDULERS[fields.scheduler],
        "lr_scheduler_kwargs": schedule_options(fields, steps),
        "warmup_steps": _warmup_steps(context, steps),
        "weight_decay": fields.weight_decay,
        "max_grad_norm": fields.max_grad_norm,
        "max_length": None,  # rows are already cut
        "save_strategy": "steps",
        "save_steps": fields.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        # A loss of NaN must reach the log: ReportProgress stops the stage there.
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
        "disable_tqdm": True,
        **tracking_options(context),
        **parallel_options(context, on_gpu),
    }
    if ROUTER_LOSS in config_class.__dataclass_fields__:
        # SFT overrides this: only the loss that a mixture of experts was pretrained with has the routers' term.
        options[ROUTER_LOSS] = 0.0
    try:
        options |= {**stage_options, **fields.trainer, **offload_options(context, on_gpu)}
        options["gradient_checkpointing"] = starts_with_recomputation(fields, context.guess, options)
        arguments = config_class(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{context.name}: trainer: {error}") from None
    arguments.launch = context.runtime.launch
    arguments.precision = context.precision
    arguments.shared_prefixes = shares_prefixes(context)
    arguments.row_group = fields.row_group
    settings = MemorySettings(fields.micro_batch_sizes(world_size()), fields.gradient_checkpointing == "auto")
    arguments.memory = settings.up_to(context.guess)
    if arguments.deepspeed:
        from align.training.zero import count_micro_batches

        count_micro_batches(arguments, arguments.memory.sizes[0])
    return use_one_device(arguments)


def starts_with_recomputation(
    fields: TrainingFields | RolloutFields, guess: MemoryGuess | None, options: dict[str, Any]
) -> bool:
    """Return True if activations are recomputed from the first step on.

    The reason is the config, the plan's choice, or ``options`` of the trainer that move the inputs of recomputed layers
    to the machine's memory.
    """
    is_planned = guess is not None and guess.recomputes
    moves = bool((options.get("gradient_checkpointing_kwargs") or {}).get("offload"))
    return fields.recomputes or moves or (fields.gradient_checkpointing == "auto" and is_planned)


def shares_prefixes(context: StageContext) -> bool:
    """Return True if the stage's models compute shared prefixes of rows once (``trainers.reduce_work``).

    Options of the trainer that need padded rows turn it off: a compiled model would be compiled again for every line's
    length, and transformers scales noise on embeddings by the length of the batch.
    """
    options = context.config.trainer
    needs_padding = any(options.get(name) for name in NEEDS_PADDING)
    return context.runtime.shared_prefixes and not needs_padding


def use_one_device(arguments: T) -> T:
    """Make a process train on one device, however many are visible; call it on finished ``arguments``.

    A single process of transformers would use all devices through ``nn.DataParallel`` and multiply the rows of a step
    by their number. ``runtime.launch`` trains on several devices with one process each. The others stay visible for an
    engine in this process that is sharded over them.
    """
    transformers.use_one_device(arguments)
    return arguments
