"""Settings of judges: an endpoint that compares or grades answers, or the stage's reward model. Torch-free."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.endpoint import EndpointConfig

PAIR_RUBRIC = (
    "Prefer the answer that does what was asked, is correct, and leaves out what nobody needs. Length, confidence and "
    "politeness are no merits of their own."
)
"""Default criteria of a comparison; part of the prompt, so a change of it changes cached verdicts."""


class JudgeConfig(Config):
    """Judge that labels pairs for a synthesize stage.

    With ``endpoint`` null the judge is the checkpoint of the stage that ``judge_model`` names.
    """

    endpoint: EndpointConfig | None = None
    """The server that judges."""
    rubric: str = PAIR_RUBRIC
    """Criteria for the better answer; part of the prompt. ``{row[answer]}`` quotes a column that the recipe keeps."""
    max_tokens: int = Field(512, ge=1)
    """Longest verdict in tokens. A verdict that is cut off before its last line is unreadable, and is counted."""
    temperature: float = Field(0.0, ge=0, le=5)
    """0 asks for the likeliest verdict."""

    @field_validator("rubric")
    @classmethod
    def _not_blank(cls, rubric: str) -> str:
        if not rubric.strip():
            raise ValueError("is empty; say what makes an answer better")
        return rubric


class EndpointJudge(Config):
    """Settings of an endpoint that judges an evaluation's answers."""

    endpoint: EndpointConfig | None = None
    """The server that judges; a local vLLM server is one."""
    rubric: str | None = Field(None, pattern=r"\S")
    """Criteria for a good answer, in place of the default; part of every prompt. ``{row[answer]}`` quotes a field of
    the question's record."""
    max_tokens: int = Field(512, ge=1)
    """Longest verdict in tokens. A verdict that is cut off before its last line is unreadable, and is counted."""
    temperature: float = Field(0.0, ge=0, le=5)
    """0 asks for the likeliest verdict."""
    seed: int = Field(0, ge=0)
    """Another seed asks every question again: for a second opinion at a temperature above 0, or of a repaired
    server."""
    max_unreadable: float = Field(0.1, ge=0, lt=1)
    """Largest share of unreadable judgments of any system or pair; they are counted and skipped. More is an error."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoint costs more in all, by its prices; raise it and run again to continue."""

    @model_validator(mode="after")
    def _prices_for_the_budget(self) -> EndpointJudge:
        if self.max_cost is not None and (self.endpoint is None or self.endpoint.price_input is None):
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that verdicts depend on."""
        settings = self.model_dump(include={"rubric", "max_tokens", "temperature", "seed"})
        return settings | (self.endpoint.identity() if self.endpoint is not None else {})


class TaskJudge(EndpointJudge):
    """The judge of a task: ``{reward: true}``, the stage's reward model, or ``{endpoint: {...}}``."""

    reward: bool | Literal["second_reward"] = False
    """The stage's reward model (or its second one) prefers the answer it scores higher, whatever their order."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if bool(self.reward) == (self.endpoint is not None):
            raise ValueError("name the judge: `reward: true` or `endpoint`, one of them")
        if self.reward:
            unused = sorted(self.changed("rubric", "max_tokens", "temperature", "seed"))
            if unused:
                raise ValueError(f"a reward model does not use {', '.join(unused)}; remove it")
        return self

    @property
    def reward_field(self) -> Literal["reward", "second_reward"] | None:
        """Input field of the reward model that judges; None for an endpoint."""
        if not self.reward:
            return None
        return "second_reward" if self.reward == "second_reward" else "reward"

    def identity(self) -> dict[str, Any]:
        """Return the settings that verdicts depend on; the reward model itself is an input of the stage."""
        return {"reward": self.reward_field} if self.reward else super().identity()
