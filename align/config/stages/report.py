"""Settings of the stage ``report``: the stages that its page shows. Torch-free."""

from __future__ import annotations

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.store.artifacts import Kind

SHOWN = tuple(kind for kind in Kind if kind != Kind.REPORT)


class ReportConfig(Config):
    """The report's contents."""

    scorecard: stage_input(Kind.SCORECARD) | None = None  # type: ignore[valid-type]
    """Evaluation whose results and samples are shown; without one the page has only costs and curves."""
    stages: list[stage_input(*SHOWN)] = Field(default_factory=list)  # type: ignore[valid-type]
    """Stages to show, with curves, cost and settings, in this order."""
    title: str = Field("Alignment report", min_length=1, max_length=120)
    """Heading of the page."""

    @model_validator(mode="after")
    def _shows_something(self) -> ReportConfig:
        if self.scorecard is None and not self.stages:
            raise ValueError("nothing to show; list stages, or name a scorecard.")
        return self
