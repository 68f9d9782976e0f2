"""Stage ``rejection``: best-of-N fine-tuning in rounds (RAFT, arXiv 2304.06767; ReST, 2308.08998)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.rl import RolloutFields
from align.pipeline.context import StageContext


class RejectionConfig(RolloutFields):
    """An update is a round: sample, keep the best of each prompt, learn them as in SFT, and sample again.

    A round has ``rollout_batch / samples_per_prompt`` prompts, and ``num_epochs x num_mini_batches`` optimizer steps.
    There is no reference in the loss: what holds the policy back is that it learns only what it says already. The loss
    is SFT's, at temperature 1: sampled at a lower ``temperature``, the policy grows surer of itself with every round.
    """

    kind: ClassVar[str] = "rejection"

    updates: int = Field(3, ge=1)
    """Rounds."""
    rollout_batch: int = Field(512, ge=1)
    """Responses per round."""
    samples_per_prompt: int = Field(8, ge=1)
    """Responses to each prompt to choose from; more gives better ones, more slowly each time."""
    num_mini_batches: int = Field(4, ge=1)
    """Optimizer steps per pass over what was kept."""
    best: int = Field(1, ge=1)
    """Best responses to each prompt that are learned from; one said twice counts once."""
    threshold: float | list[float] | None = None
    """Lowest score, penalties taken off, that is learned from; a list has one for each round, the last one stays."""
    truncated: Literal["learn", "mask"] = "mask"
    """Whether a response cut at ``max_tokens`` may be among the best; learned from, it teaches not to end."""

    @property
    def kept_per_prompt(self) -> int:
        """``best``."""
        return self.best

    @model_validator(mode="after")
    def _best_of_several(self) -> Self:
        if self.best > self.samples_per_prompt:
            raise ValueError(f"best {self.best} is more than samples_per_prompt {self.samples_per_prompt}.")
        if self.samples_per_prompt == 1 and self.threshold is None:
            raise ValueError("samples_per_prompt is 1 and there is no threshold: nothing is chosen. Set one of them.")
        if isinstance(self.threshold, list) and not 1 <= len(self.threshold) <= self.updates:
            raise ValueError(f"threshold has {len(self.threshold)} values for {self.updates} rounds (updates).")
        return self


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return what ``ppo`` does, with how much was selected; resumes after a whole round."""
    from align.stages.critic_free import train

    return train(context)
