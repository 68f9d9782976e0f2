"""One self-contained HTML page about the stages it is given."""

from __future__ import annotations

import json
from typing import Any

from align.config.stages.report import ReportConfig
from align.errors import UserError
from align.pipeline.context import StageContext


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
