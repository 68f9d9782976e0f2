"""Settings of the stage ``sample``: responses to prompts, scored and paired. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import Config, PrecisionSetting, stage_input
from align.config.chat_template import TEMPLATE_FIELDS, TemplateVariables, Thinking, ThinkingBudget, check_stage_budget
from align.config.environment import EnvironmentConfig, take_episode_tokens
from align.config.scores import Score, ScoreValidation, score_identities
from align.config.stages.stored_rollouts import StoredRollouts
from align.config.stages.training import LongRows
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind


class SplitCounts(Config):
    """Number of prompts per split, from the first one; all by default."""

    train: int | None = Field(None, ge=1)
    """Prompts of the ``train`` split."""
    test: int | None = Field(None, ge=1)
    """Prompts of the ``test`` split."""


class SampleConfig(Config):
    """Sampling of responses, and their pairing."""

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint samples."""
    prompts: stage_input(*PROMPT_SOURCES)  # type: ignore[valid-type]
    """Stage with the prompts; both splits are used."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward stage that scores the responses, if ``score`` is null."""
    environment: EnvironmentConfig | None = None
    """Environment that the policy acts in over several turns, with tools or by answers. It scores episodes; ``reward``
    and ``score``, which read an episode's last turn, add to that score if they are set (docs/environments.md)."""
    n: int = Field(4, ge=2, le=64)
    """Responses per prompt. More responses widen the range of scores and cost proportionally more time."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Divisor of the logits; higher values give more varied responses."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens with this total probability; 1 uses all."""
    max_tokens: int = Field(64, ge=1)
    """Most tokens per response; a longer one is cut off and counts as unfinished."""
    thinking_budget: ThinkingBudget = None
    """Close a thought by force after this many tokens, and continue with the answer (docs/thinking.md). Null: no
    limit."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are dropped and counted."""
    long_rows: LongRows = "refuse"
    """``refuse`` ends the stage before sampling if more than half of the train prompts are longer than that."""
    thinking: Thinking = None
    """``on`` or ``off`` sets the thinking switch of the policy's chat template; by default as the checkpoint has it
    (docs/thinking.md)."""
    chat_template_kwargs: TemplateVariables = Field({})
    """Variables of the policy's chat template, in place of the checkpoint's."""
    score: Score = "gold"
    """Function that scores responses (``gold``, or an import path ``module:name``), or a list of rewards; null for
    ``reward``. With an ``environment`` the default is null: only its score counts."""
    cut_off_score: float | None = None
    """Score of every response that was cut off at ``max_tokens``; null scores it like any other."""
    noise: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs to swap, to simulate the errors of human labelers."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """One pair per prompt (best and worst response), or every two responses with different scores."""
    max_prompts: SplitCounts = SplitCounts()
    """Most prompts per split: ``{train: 600, test: 100}``."""
    rollouts: StoredRollouts = StoredRollouts()
    """Parquet files of all responses with their tokens and scores: ``{keep: 1.0, max_gb: 2}``."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products; ``auto`` measures which one this device multiplies faster in."""
    score_validation: ScoreValidation = ScoreValidation()
    """Validation of ``score`` on reference, empty and wrong answers before the engine starts (docs/rewards.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"score", "environment", "score_validation"})
    keyed_when_set: ClassVar[frozenset[str]] = TEMPLATE_FIELDS | {"environment", "thinking_budget"}

    @model_validator(mode="after")
    def _check_score_or_reward(self) -> SampleConfig:
        if self.environment is not None:
            if "score" not in self.model_fields_set:
                # Without a note that it was set: the file did not set it.
                self.__dict__["score"] = None
            if self.score is None or self.reward is None:
                return self
            raise ValueError("both score and reward are set; with an environment at most one of them scores.")
        if (self.score is None) == (self.reward is None):
            have = "both score and reward are" if self.score else "neither score nor reward is"
            raise ValueError(f"{have} set; exactly one scores the responses. With a reward stage, write `score: null`.")
        return self

    @model_validator(mode="after")
    def _use_episode_tokens(self) -> SampleConfig:
        take_episode_tokens(self)
        check_stage_budget(self)
        return self

    def fields_outside_key(self) -> set[str]:
        """Return ``identified``, ``long_rows`` and ``rollouts``, on which no result depends."""
        return {*super().fields_outside_key(), "long_rows", "rollouts"}

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identities of all that scores, and of the environment."""
        environment = {} if self.environment is None else {"environment": self.environment.identity()}
        return score_identities(self.score) | environment
