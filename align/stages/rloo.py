"""Stage ``rloo``: REINFORCE with the mean of the other responses to the prompt as the baseline (arXiv 2402.14740)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from align.config.stages.rl import DriftFields
from align.pipeline.context import StageContext


class RlooConfig(DriftFields):
    """``ppo``'s fields, without a critic's; a response is one action, and drift is paid for in its score."""

    kind: ClassVar[str] = "rloo"

    samples_per_prompt: int = Field(4, ge=2)
    """Responses to each prompt; each is compared with the others' mean."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """A response's probability ratio earns nothing further below 1 than this."""
    clip_range_high: float | None = Field(None, gt=0)
    """And nothing further above 1; by default ``clip_range``."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the update's responses."""


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return what ``ppo`` does, without a critic's metrics; resumes."""
    from align.stages.critic_free import train

    return train(context)
