"""Settings of the stage ``report``: the stages that its page shows. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.store.artifacts import Kind

SHOWN = tuple(kind for kind in Kind if kind != Kind.REPORT)


class ReportConfig(Config):
    """What the page shows."""

    scorecard: stage_input(Kind.SCORECARD) | None = None  # type: ignore[valid-type]
    """Evaluation whose numbers and samples are shown; without one the page has cost and curves only."""
    stages: list[stage_input(*SHOWN)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Stages in the picture, with their curves, cost and settings, in the order shown."""
    title: str = Field("Alignment report", min_length=1, max_length=120)
    """Heading of the page."""

    @model_validator(mode="after")
    def _shows_something(self) -> ReportConfig:
        if self.scorecard is None and not self.stages:
            raise ValueError("nothing to show; list stages, or name a scorecard.")
        return self
