"""Who asks an engine, where several processes train or several servers sample: once for all, or each apart.

An engine in a process answers for that process; of servers, which the first process keeps, it asks for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from align.config.launch import rank
from align.inference.pool import PoolEngine
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling
from align.models.processes import part_of

Found = TypeVar("Found")


class ElsewhereEngine:
    """What a stage's other processes have in place of the pool, which the first one keeps and asks for all of them."""

    name = PoolEngine.name

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Nobody may ask here."""
        raise RuntimeError("the servers of runtime.rollouts are asked by the stage's first process")

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Nor for this."""
        raise RuntimeError("the servers of runtime.rollouts are asked by the stage's first process")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The first process gives them."""

    def close(self) -> None:
        """Nothing is held."""


def is_shared(engine: Any) -> bool:
    """Whether the first process asks the engine for all."""
    return isinstance(engine, PoolEngine | ElsewhereEngine)


def part_for(engine: Any, count: int) -> range:
    """Of ``count`` prompts in a row, those that this process asks ``engine`` about."""
    if is_shared(engine):
        return range(count if rank() == 0 else 0)
    return part_of(count)


def ask_each(engine: RolloutEngine, do: Callable[[RolloutEngine], Found]) -> list[Found]:
    """Do something with every engine behind one that must hold the weights: a pool's servers, or the engine itself."""
    if isinstance(engine, ElsewhereEngine):
        return []
    return engine.ask_each(do) if isinstance(engine, PoolEngine) else [do(engine)]


def returns(engine: RolloutEngine) -> int:
    """Times that a server of a pool came back; 0 for any other engine."""
    return engine.returns if isinstance(engine, PoolEngine) else 0
