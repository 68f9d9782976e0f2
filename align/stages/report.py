"""Stage ``report``: one self-contained HTML page about other stages."""

from __future__ import annotations

from typing import Any

from align.config.stages.evaluate import ReportConfig
from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Write ``report.html``. Raises ``UserError`` for a damaged scorecard or another version's scorecard."""
    from align.evaluation.scorecard import read_content, scorecard_file
    from align.report.run.run_report import write_report

    config: ReportConfig = context.config
    artifacts = list(context.inputs.get("stages") or [])
    source = context.inputs.get("scorecard")
    card = None
    if source is not None:
        card = read_content(scorecard_file(source.path), source.stage)
        # the page shows the samples of the last scorecard, so the artifact with this scorecard goes to the end
        with_scorecard = [artifact for artifact in artifacts if artifact.path == source.path]
        artifacts = [artifact for artifact in artifacts if artifact.path != source.path] + (with_scorecard or [source])
    page = write_report(artifacts, card, context.output / "report.html", title=config.title)
    return {"stages": len(artifacts), "bytes": page.stat().st_size}
