"""Running normalization of scores: reward models differ in scale, while KL and clip ranges are in units of score."""

from __future__ import annotations

from typing import Any

import torch

from align.rl.masking import Reduce, local


class RunningScale:
    """Mean and standard deviation of all scores so far, over all processes (Chan et al. 1979, one pass per batch)."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0
        """Sum of squared deviations from the mean."""

    def add(self, scores: torch.Tensor, reduce: Reduce = local) -> None:
        """Add a batch of scores (B,)."""
        # Merge the batch's mean and squares into the running ones; the shift between the means adds to the squares.
        values = scores.double()
        count, total = reduce(torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), values.sum()]))
        batch_mean = float(total / count)
        batch_squares = float(reduce(((values - batch_mean) ** 2).sum()))
        shift = batch_mean - self.mean
        total_count = self.count + float(count)
        self.squares += batch_squares + shift**2 * self.count * float(count) / total_count
        self.mean += shift * float(count) / total_count
        self.count = total_count

    @property
    def std(self) -> float:
        """Population standard deviation; 0 as long as all scores were equal."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Return ``(scores - mean) / std``, (B,), of scores (B,); undivided as long as all scores were equal."""
        return (scores - self.mean) / (self.std or 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = (float(state[name]) for name in ("count", "mean", "squares"))
