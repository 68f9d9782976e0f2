"""One self-contained HTML page about the stages it is given."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.errors import UserError
from align.pipeline.context import StageContext
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


def run(context: StageContext) -> dict[str, Any]:
    """Write ``report.html``. Raises ``UserError`` for a scorecard of another format."""
    from align.evaluation.scorecard import FORMAT
    from align.report.page import write_report

    config: ReportConfig = context.config
    artifacts = list(context.inputs.get("stages") or [])
    source = context.inputs.get("scorecard")
    card = None
    if source is not None:
        card = json.loads((source.path / "scorecard.json").read_text(encoding="utf-8"))
        if card.get("format") != FORMAT:
            raise UserError(
                f"scorecard: {source.path} has format {card.get('format')}, this align reads {FORMAT}; rebuild "
                f"{source.stage}."
            )
        # the one asked for comes last: its samples are shown
        same = [one for one in artifacts if one.path == source.path]
        artifacts = [one for one in artifacts if one.path != source.path] + (same or [source])
    page = write_report(artifacts, card, context.output / "report.html", title=config.title)
    return {"stages": len(artifacts), "bytes": page.stat().st_size}
