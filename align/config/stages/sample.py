"""Settings of the stage ``sample``: responses to prompts, scored and paired. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind


class SplitCounts(Config):
    """Prompts used of each split, the first ones; all of them by default."""

    train: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)


class SampleConfig(Config):
    """What is sampled and how responses become pairs."""

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """The stage whose checkpoint answers."""
    prompts: stage_input(*PROMPT_SOURCES)  # type: ignore[valid-type]
    """The stage whose prompts are answered, both splits."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """A reward stage that scores the responses, when ``score`` is null."""
    n: int = Field(4, ge=2, le=64)
    """Responses per prompt; more finds better and worse ones, and costs as much more time."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Logits are divided by it; higher gives more varied responses."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that make up this much probability; 1 keeps all."""
    max_tokens: int = Field(64, ge=1)
    """Tokens per response at most; a longer one is cut off and counted as unfinished."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this are left out, and counted."""
    score: str | None = "gold"
    """Verifiable function that scores responses: ``gold``, or an import path ``module:name``; null for ``reward``."""
    cut_off_score: float | None = None
    """Score of a response that was cut off at ``max_tokens``, whatever its text; null scores it like any other."""
    noise: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose sides are swapped, as human labellers would: a reward model never sees clean labels."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """One pair per prompt (best and worst response), or every two responses with different scores."""
    max_prompts: SplitCounts = SplitCounts()
    """``{train: 600, test: 100}``: prompts used of each split at most."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products."""

    identified: ClassVar[frozenset[str]] = frozenset({"score"})

    @model_validator(mode="after")
    def _one_scorer(self) -> SampleConfig:
        if (self.score is None) == (self.reward is None):
            have = "both score and reward are" if self.score else "neither score nor reward is"
            raise ValueError(f"{have} set; one scores the responses. With a reward stage, write `score: null`.")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """The scoring function, by its code."""
        if self.score is None:
            return {}
        from align.config.user_functions import function_identity

        return {"score": function_identity(self.score)}
