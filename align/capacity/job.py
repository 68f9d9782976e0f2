"""Load of a stage that trains, as a function of how it is run on devices. Torch-free.

The estimators of training kinds (``estimators/training.py``, ``estimators/rl.py``) build a ``Job``;
``align.capacity.training_ways`` places it on devices. The number of rows of a dataset comes from its artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from align.capacity.memory import Memory
from align.config.base import Precision
from align.config.launch import LaunchConfig
from align.config.tuning import TuningBase
from align.models.architecture import Architecture


@dataclass(frozen=True)
class Setting:
    """The way in which a stage runs in one process."""

    rows: int
    """Rows of a micro-batch."""
    accumulated: bool = True
    """Whether an optimizer step has several micro-batches."""
    processes: int = 1
    checkpointing: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Work:
    """Floating-point operations and tokens per row trained on."""

    learning: float
    """Operations of forward and backward passes, in all epochs over a rollout."""
    recomputation: float
    """Operations that checkpointing adds."""
    scoring: float = 0.0
    """Operations of passes without gradients: references, reward models, log-probabilities of a rollout."""
    tokens: float = 0.0
    """Tokens trained on, padding included."""
    sampled: float = 0.0
    """Tokens that the policy samples."""


@dataclass(frozen=True)
class Job:
    """One stage that trains: its model, its memory in a setting, its work per row."""

    model: Architecture
    tuning: TuningBase
    precision: Precision
    batch: int
    """Rows of an optimizer step, over all processes."""
    micro_batch: int
    """Rows of a micro-batch in the config."""
    row: str
    """Name of a row in the plural: ``rows``, ``pairs``, ``responses``."""
    tokens: Callable[[int], int]
    """Return the most tokens that so many rows have in memory."""
    memory: Callable[[Setting], Memory]
    """Return the bytes of one process in a setting."""
    work: Callable[[float], Work]
    """Return the work per row, for rows with this mean length as a share of the greatest."""
    rows: Callable[[int | None], int | None]
    """Return the rows trained on in the stage from those of its data; None for unknown."""
    steps: Callable[[int], int]
    """Return the optimizer steps for so many rows."""
    run_micro_batch: Callable[[int], int]
    """Return the rows of a micro-batch that the run takes in each of so many processes."""
    objection: Callable[[LaunchConfig], str | None]
    """Return why the stage cannot run in such processes, whatever their micro-batches; None if it can."""
    unit: int = 1
    """Rows that no micro-batch separates."""
    rollout: int = 0
    """Responses of one rollout; 0 for a stage that does not sample."""
    trained: int = 0
    """Parameters with gradients, the critic's included."""
    gathered: int = 0
    """Parameters that sharding gathers for a micro-batch: the policy's, and a separate critic's."""
    checkpointing: bool = False
    """Whether the config asks for gradient checkpointing."""
    checkpointing_field: str = "gradient_checkpointing"
    """The config's field for it."""
    notes: tuple[str, ...] = ()
