"""Rules of ``continue_from``: settings that may change, and when the result equals one longer run's. Torch-free.

They are used by the pipeline (errors), the planner (statements) and the trainers (file names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from align.config.base import Config, stage_input
from align.store.artifacts import Kind

CONTINUE = "continue_from"
END = "end_after"
"""Field for the steps or updates after which a stage ends, because another stage continues it there."""
STATE = "state"
"""Folder of an artifact with the trainer's state."""
LARGEST_STATE = 2 * 10**9
"""Bytes of the largest state that ``runtime.keep_state: auto`` keeps: adapters of any model, all of 165M weights."""
LENGTHS = ("max_steps", "epochs", "updates")
"""Fields for the length of training, which a continued stage raises."""
DATA = ("data", "prompts", "max_rows", "max_prompts")
"""Fields for the rows, which may be other ones."""
EVALUATED = ("eval_rows", "eval_prompts", "eval_steps", "eval_updates", "evaluate")
"""Fields of evaluations during training."""
MEMORY_FIELDS = frozenset({"micro_batch_size", "gradient_checkpointing"})
"""Fields that decide memory and speed, and no result unless a loss compares a micro-batch's rows."""
OBSERVED = ("save_steps", "save_updates", "rollouts", "lint", "long_rows", *EVALUATED)
"""Fields that only observe training, or refuse it."""
TOTAL_SCHEDULES = ("linear", "cosine", "cosine_with_min_lr")
"""Schedules of the learning rate whose every step depends on the number of steps."""
_SHAPE = "the kept weights and the optimizer's state have its shape"
_POSITION = "it decides the rows of every step, by which the position in them is kept"
_BEGINNING = "it applies from the first step"
FIXED: Mapping[str, str] = {
    **dict.fromkeys(("model", "policy", "tuning", "train_router", "critic", "objective", "steps"), _SHAPE),
    **dict.fromkeys(("batch_size", "packing", "rollout_batch", "samples_per_prompt"), _POSITION),
    **dict.fromkeys(("num_epochs", "num_mini_batches", "replay", "replay_fraction"), _POSITION),
    **dict.fromkeys(("max_staleness", "in_flight", "seed"), _POSITION),
    **dict.fromkeys(("ema", "keep", "early_stopping", "warmup_ratio"), _BEGINNING),
    "trainer": "its options may decide the optimizer's state",
    "precision": "the state was computed in it",
}
"""Fields that ``change`` cannot set, and the reason as a clause."""


class ChangedStage(Config):
    """A stage to continue from, and the settings that change there."""

    stage: stage_input(Kind.POLICY, Kind.REWARD)  # type: ignore[valid-type]
    """Stage of the same kind to continue."""
    at: Literal["last"] | Annotated[int, Field(ge=1)] = "last"
    """Steps, or updates, after which to continue; the other stage ends there in this pipeline. ``last``: its end, or
    for a stage that was stopped its last checkpoint, whose number the plan shows."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Fields of the stage with other values from there on: ``{kl_coef: 0.5}``."""


def continued_stage(block: Mapping[str, Any]) -> str | None:
    """Return the stage that a stage's block, as the YAML has it, continues; None if it continues none."""
    source = block.get(CONTINUE)
    if isinstance(source, Mapping):
        source = source.get("stage")
    return source if isinstance(source, str) else None


def changes_in(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a stage's block, as the YAML has it, changes on continuing another stage."""
    source = block.get(CONTINUE)
    change = source.get("change") if isinstance(source, Mapping) else None
    return dict(change) if isinstance(change, Mapping) else {}


def changed_names(config: Any) -> frozenset[str]:
    """Return the fields that a stage's config changes on continuing another stage."""
    source = config.continue_from
    return frozenset(source.change) if isinstance(source, ChangedStage) else frozenset()


def end_in(block: Mapping[str, Any]) -> int | None:
    """Return the number in ``at`` of a stage's block, as the YAML has it; None for ``last``."""
    source = block.get(CONTINUE)
    end = source.get("at") if isinstance(source, Mapping) else None
    return end if isinstance(end, int) else None


def awaits_store(config: Any) -> bool:
    """Return True for a stage that continues the last state of another, which the store has to tell."""
    source = getattr(config, CONTINUE, None)
    return isinstance(source, ChangedStage) and source.at == "last"


def fixed_reason(config: Any, name: str) -> str | None:
    """Return why a continued stage cannot change a field, as a clause; None for a field that may change."""
    if name == "micro_batch_size" and name not in config.fields_outside_key():
        return "the loss compares the rows of a micro-batch"
    if name == "reward" and getattr(config, "critic_source", None) == "reward":
        return "the critic began with it"
    if name in (*DATA, *EVALUATED) and chooses_by_validation(config):
        return "validation rows, which choose the checkpoint, are a part of them"
    return FIXED.get(name)


def size_text(size: int) -> str:
    """Return bytes as ``1.6 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def chooses_by_validation(config: Any) -> bool:
    """Return True for a stage whose validation rows are a part of its training rows."""
    holds_back = getattr(config, "chooses", False) or getattr(config, "holds_back", False)
    return bool(holds_back) or getattr(config, "keep", "last") != "last"


def must_be_equal(config: Any) -> list[str]:
    """Return the fields of a stage's config that a continuing stage must not change."""
    free = {CONTINUE, END, *LENGTHS, *DATA, *OBSERVED, *changed_names(config)}
    free |= config.fields_outside_key() & MEMORY_FIELDS
    if chooses_by_validation(config):
        # Where validation decides, its rows and times are a part of the training.
        free -= {*DATA, *EVALUATED}
    return [name for name in type(config).model_fields if name not in free]


def warmup_steps(config: Any, steps: int) -> int:
    """Return the steps of the warm-up of a run of ``steps`` optimizer steps."""
    share: float = config.warmup_ratio
    return math.ceil(share * steps)


def steps_per_length(config: Any) -> int:
    """Return the optimizer steps of one unit of the stage's length: of an update, 1 for a step."""
    return int(config.num_epochs * config.num_mini_batches) if hasattr(config, "updates") else 1


def unit_of(config: Any) -> str:
    """Return the word for a unit of the stage's length."""
    return "update" if hasattr(config, "updates") else "step"


def inexactness(config: Any, finished_steps: int | None, steps: int | None) -> str | None:
    """Return why a stage that continues another differs from one run of ``steps``, as a clause; None if they are equal.

    ``finished_steps`` are the optimizer steps of the other stage. ``None`` means that a number of steps is not known
    yet. The function assumes the same rows.
    """
    if config.scheduler in TOTAL_SCHEDULES:
        return f"scheduler {config.scheduler} sets every step's rate by the number of steps"
    if getattr(config, "beta_schedule", "constant") != "constant":
        return f"beta_schedule {config.beta_schedule} sets every step's beta by the number of steps"
    if getattr(config, "in_flight", "wait") == "continue":
        return "with `in_flight: continue` the weights of every turn depend on the clock"
    if getattr(config, "max_staleness", 0):
        return "with max_staleness the last updates of the first part were sampled from other weights"
    if not config.warmup_ratio:
        return None
    if finished_steps is None or steps is None:
        return f"warmup_ratio {config.warmup_ratio:g} of more steps may be a longer warm-up"
    before, after = warmup_steps(config, finished_steps), warmup_steps(config, steps)
    if before != after:
        return (
            f"its warm-up took {before} steps, where warmup_ratio {config.warmup_ratio:g} of {steps} steps is {after}"
        )
    return None
