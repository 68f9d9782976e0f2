"""Writes the report of a run as one HTML file: for a finished, a partial or a failed run.

The page makes no requests. Text that a model, a dataset or a log wrote never becomes markup: Jinja escapes it, hidden
characters are spelled out, and a content security policy allows only the page's own script, by its hash. Figures as SVG
and tables as CSV and JSON are next to the page (``align.report.page.assets``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.stages.evaluate import ReportConfig
from align.evaluation.scorecard import read_content, scorecard_file
from align.pipeline.context import StageContext
from align.report.page.assets import FIGURES, TABLES, AssetWriter
from align.report.page.curve_panels import curve_sections
from align.report.page.metric_series import read_events
from align.report.page.panels import Panel
from align.report.page.templates import load_template, page_shell, script_json
from align.report.run import data_ledgers, stage_costs
from align.report.run.stage_costs import pipeline_diagram
from align.report.run.training_health import measured_changes, training_health, unusable
from align.report.scorecard.sections import evaluation_sections
from align.store.artifacts import Artifact
from align.store.json_files import read_tail, write_text_atomically

LOG_TAIL = 6_000
"""Bytes of a failed stage's log on the page."""
STATUSES = {"failed": ("✗", "failed"), "stopped": ("✗", "was stopped"), "running": ("…", "is running")}
"""Mark and words for an unfinished stage, by its ``status``."""


def write_report(
    artifacts: Sequence[Artifact],
    scorecard: dict[str, Any] | None,
    out: Path,
    failed: dict[str, Any] | None = None,
    title: str = "Alignment report",
    *,
    cached: Collection[str] = (),
    pending: Mapping[str, Sequence[str]] | None = None,
    states: Mapping[str, str] | None = None,
    refresh: int | None = None,
) -> Path:
    """Write the page about ``artifacts`` (finished stages, in order) to ``out`` and return ``out``.

    Figures and tables go into ``figures`` and ``tables`` in the same folder. ``scorecard`` is a parsed
    ``scorecard.json``; None means the last scorecard among the artifacts. ``failed`` describes a stage that did not
    finish: ``stage`` and ``message``, and optionally ``status`` (``failed``, ``stopped`` or ``running``), ``kind``,
    ``log`` (path), ``folder`` (its partial folder, whose curves are shown), ``inputs`` and ``pending`` (stage names).
    ``cached`` names the finished stages that this run did not have to run. ``pending`` has further stages that are not
    finished, each with the names of the stages that it reads; ``states`` has those that are ``running`` or ``failed``,
    and the others were not run. ``refresh`` is the number of seconds after which the page reloads itself while its run
    continues.
    """
    Panel.start_page()
    assets = AssetWriter()
    # Each section reads its content and adds its figures and tables to ``assets``. The page is rendered before the
    # first file is written, so an error leaves the earlier page unchanged.
    finished_events = {artifact.stage: read_events(artifact.path) for artifact in artifacts}
    events = dict(finished_events)
    if failed and failed.get("folder"):
        # An unfinished stage has curves, but no place among the costs and warnings of finished stages.
        events[str(failed["stage"])] = read_events(Path(failed["folder"]))
    curves = curve_sections(events, assets)
    data = data_ledgers.data_sections(artifacts)
    licenses = data_ledgers.license_rows(artifacts)
    data_ledgers.add_data_tables(data, licenses, assets)
    stage_costs.add_cost_table(artifacts, assets)
    html = load_template("run_report.html.jinja").render(
        **page_shell(title),
        refresh=refresh,
        totals=stage_costs.totals(artifacts),
        failure=_failure(failed),
        diagram=pipeline_diagram(artifacts, failed, cached, pending, states),
        changes=measured_changes(artifacts),
        health=training_health(events),
        unusable=unusable(artifacts),
        stages=stage_costs.stage_rows(artifacts, finished_events),
        data=data,
        licenses=licenses,
        data_license=data_ledgers.data_license(licenses),
        curves=curves.sections,
        curves_json=script_json(curves.readings),
        folders=(FIGURES, TABLES),
        **evaluation_sections(artifacts, scorecard, events, assets),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    assets.write(out.parent)
    write_text_atomically(out, html)
    return out


def _failure(failed: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the page's data about the unfinished stage: its state, its message and the end of its log."""
    if failed is None:
        return None
    status = str(failed.get("status") or "failed")
    mark, words = STATUSES[status]
    log = failed.get("log")
    return {
        "stage": str(failed["stage"]),
        "running": status == "running",
        "mark": mark,
        "words": words,
        "message": str(failed.get("message", "")),
        "log": str(log or ""),
        "tail": _log_tail(Path(log)) if log else "",
        "pending": [str(name) for name in failed.get("pending", [])],
    }


def _log_tail(log: Path) -> str:
    """Return the last :data:`LOG_TAIL` bytes of ``log`` as text."""
    try:
        return read_tail(log, LOG_TAIL).decode("utf-8", errors="replace")
    except OSError:
        return "(the log cannot be read)"


def run(context: StageContext) -> dict[str, Any]:
    """Run the stage ``report``: write ``report.html``.

    Raises ``UserError`` for a damaged scorecard or another version's scorecard.
    """
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
