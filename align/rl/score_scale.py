"""Scores on a running scale: reward models differ in theirs, and KL and clip ranges are set in units of score."""

from __future__ import annotations

from typing import Any

import torch

from align.rl.masking import Reduce, local


class RunningScale:
    """Mean and standard deviation of every score so far, over all processes (Chan et al. 1979, in one pass a batch)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def add(self, scores: torch.Tensor, reduce: Reduce = local) -> None:
        """Take one batch of scores (B,) into account."""
        values = scores.double()
        count, total = reduce(torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), values.sum()]))
        batch_mean = float(total / count)
        around = float(reduce(((values - batch_mean) ** 2).sum()))
        shift = batch_mean - self.mean
        together = self.count + float(count)
        self.squares += around + shift**2 * self.count * float(count) / together
        self.mean += shift * float(count) / together
        self.count = together

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before two different scores came."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """``(scores - mean) / std``; only the mean is taken off while all scores were the same."""
        return (scores - self.mean) / (self.std or 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = (float(state[name]) for name in ("count", "mean", "squares"))
