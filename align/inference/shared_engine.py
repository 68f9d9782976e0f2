"""Division of an engine's calls among a stage's processes, and over the servers behind one engine.

An engine inside a process works for that process. Servers are called by the stage's first process, for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from align.config.launch import rank
from align.inference.pool import PoolEngine
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling
from align.models.processes import rank_range

Result = TypeVar("Result")


class RemoteRankEngine:
    """Placeholder for the pool in a stage's other processes; the first one calls the servers for them."""

    name = PoolEngine.name

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Refuse: only the first process may call servers."""
        raise RuntimeError("the servers of runtime.rollouts are asked by the stage's first process")

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Refuse: only the first process may call servers."""
        raise RuntimeError("the servers of runtime.rollouts are asked by the stage's first process")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Do nothing with weights of any shape: the first process gives the servers theirs."""

    def close(self) -> None:
        """Do nothing: this process holds no engine."""


def is_shared(engine: Any) -> bool:
    """Return True when the first process calls the engine for all."""
    return isinstance(engine, PoolEngine | RemoteRankEngine)


def part_for(engine: Any, count: int) -> range:
    """Return the range of ``count`` prompts for which this process calls ``engine``."""
    if is_shared(engine):
        return range(count if rank() == 0 else 0)
    return rank_range(count)


def ask_each(engine: RolloutEngine, action: Callable[[RolloutEngine], Result]) -> list[Result]:
    """Return the results of ``action`` for every server of a pool, or for the engine itself."""
    if isinstance(engine, RemoteRankEngine):
        return []
    if isinstance(engine, PoolEngine):
        return engine.ask_each(action)
    return [action(engine)]


def returns(engine: RolloutEngine) -> int:
    """Return how often a server of a pool came back; 0 for any other engine."""
    return engine.returns if isinstance(engine, PoolEngine) else 0
