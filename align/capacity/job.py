"""What a stage that trains asks of devices, as a function of how it is run on them. Torch-free.

Each kind of stage makes its own (``align.capacity.memory_training``, ``align.capacity.memory_rl``); what devices make
of it is counted in ``align.capacity``. Left out: how many rows a dataset has, which its artifact says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.capacity.memory import Memory
from align.config.tuning import TuningBase
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.models.precision import Precision


@dataclass(frozen=True)
class Setting:
    """How a stage is run on one device; ``rows`` are a micro-batch's."""

    rows: int
    accumulated: bool = True
    """Whether an optimizer step has several micro-batches."""
    processes: int = 1
    checkpointing: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Work:
    """Floating-point operations and tokens of one row that is learned from."""

    learning: float
    """Forward and backward passes, every epoch over a rollout included."""
    again: float
    """What ``checkpointing`` computes a second time."""
    scoring: float = 0.0
    """Passes without gradients: of references, reward models, and to measure a rollout."""
    tokens: float = 0.0
    """Tokens learned from, padding included."""
    sampled: float = 0.0
    """Tokens sampled by the policy."""


@dataclass(frozen=True)
class Job:
    """One stage: the model it trains, the memory of a setting, the work of a row."""

    model: Architecture
    tuning: TuningBase
    precision: Precision
    batch: int
    """Rows of an optimizer step, over all processes."""
    micro_batch: int
    """Rows of a micro-batch that the config asks for."""
    row: str
    """What a row is called: ``rows``, ``pairs``, ``responses``."""
    tokens: Callable[[int], int]
    """Most tokens that so many rows have in memory."""
    memory: Callable[[Setting], Memory]
    work: Callable[[float], Work]
    """Of a row, with rows this share as long as they may be."""
    rows: Callable[[int | None], int | None]
    """Rows learned in the whole stage, given those that its data has (None where that is not known)."""
    steps: Callable[[int], int]
    """Optimizer steps for so many rows."""
    rollout: int = 0
    """Rows sampled at a time; 0 for a stage that samples nothing."""
    trained: int = 0
    """Parameters with gradients, the critic's included."""
    gathered: int = 0
    """Parameters that sharding has to bring together for a micro-batch: the policy's, and a critic's own."""
    checkpointing: bool = False
    """Whether the config asks for it."""
    checkpointing_field: str = "gradient_checkpointing"
    """The config's word for it."""
    notes: tuple[str, ...] = ()
