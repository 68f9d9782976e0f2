"""Settings of stage ``rloo``. Torch-free."""

from __future__ import annotations

from pydantic import Field

from align.config.stages.rl import DriftFields


class RlooConfig(DriftFields):
    """The fields of ``ppo`` without its critic. A response is one action, and the KL penalty is part of its score."""

    samples_per_prompt: int = Field(4, ge=2)
    """Responses to each prompt. The baseline of each is the mean of the others."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """Clip range of a response's probability ratio below 1."""
    clip_range_high: float | None = Field(None, gt=0)
    """Clip range of the ratio above 1; by default ``clip_range``."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the update's responses."""

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high
