"""Writes the report: one HTML file with everything in it, for a finished run, a partial one, or a failed one.

Nothing on the page is fetched, and nothing that a model, a dataset or a log wrote is markup: Jinja escapes it, hidden
characters are spelled out, and a content security policy allows only the page's own script, by its hash. Beside the
page lie its figures as SVG and its tables as CSV and JSON (``beside.py``).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align.report import costs, ledgers, scores
from align.report.assets import FIGURES, TABLES, Beside
from align.report.curve_figures import stage_curves
from align.report.curves import Events, read_events
from align.report.escape import finalize, script_json
from align.report.figures import Panel
from align.report.picture import lay_out
from align.report.wording import MARKS, count, duration, interval, number, signed, size
from align.store.artifacts import Artifact
from align.store.atomic_write import write_text_atomically
from align.store.version import VERSION

HERE = Path(__file__).parent
SCRIPTS = ("samples.js", "curves.js")
SHOWN_PANELS = 8
"""Curves of a stage that are open at first; the rest unfolds."""
MAX_PANELS = 18
LOG_TAIL = 6_000
"""Bytes of a failed stage's log on the page."""
HEADS = {"failed": ("✗", "failed"), "stopped": ("✗", "was stopped"), "running": ("…", "is being made")}
"""Marks and words for a stage that is not finished, by its ``status``."""


def write_report(
    artifacts: Sequence[Artifact],
    scorecard: dict[str, Any] | None,
    out: Path,
    failed: dict[str, Any] | None = None,
    title: str = "Alignment report",
    *,
    cached: Collection[str] = (),
    pending: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write the page about ``artifacts`` (finished stages, in order) to ``out`` and return ``out``.

    Figures and tables go into ``figures`` and ``tables`` in the same folder. ``scorecard`` is the parsed
    ``scorecard.json``; when None, that of the last scorecard among the artifacts is taken. ``failed`` describes a stage
    that did not finish: ``stage`` and ``message``, and optionally ``status`` (``failed``, ``stopped`` or ``running``),
    ``kind``, ``log`` (path), ``folder`` (its partial folder, whose curves are shown), ``inputs`` and ``pending`` (stage
    names). ``cached`` names finished stages that this run found done; ``pending`` has further stages that were not run,
    each with the names of those it reads.
    """
    Panel.made = 0  # names in the figures count from here, so that the page does not depend on what was drawn before
    beside = Beside()
    events = {artifact.stage: read_events(artifact.path) for artifact in artifacts}
    shown = dict(events)
    if failed and failed.get("folder"):
        shown[str(failed["stage"])] = read_events(Path(failed["folder"]))
    curves, readings = _curves(shown, beside)
    licenses = ledgers.license_rows(artifacts, beside)
    costs.keep_tables(artifacts, beside)
    html = template("page.html.jinja").render(
        **shell(title),
        totals=costs.totals(artifacts),
        failure=_failure(failed),
        picture=lay_out(artifacts, failed, cached, pending or {}),
        stages=costs.stage_rows(artifacts, events),
        data=ledgers.data_sections(artifacts, beside),
        licenses=licenses,
        data_license=ledgers.data_license(licenses),
        curves=curves,
        curves_json=script_json(readings),
        folders=(FIGURES, TABLES),
        **scores.context(artifacts, scorecard, shown, beside),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside.write(out.parent)
    write_text_atomically(out, html)
    return out


def shell(title: str) -> dict[str, Any]:
    """What every page has around its content: heading, date, style, the one script and its hash."""
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return {
        "title": title,
        "version": VERSION,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  (our own file)
        "script": Markup(script),  # noqa: S704  (our own file)
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


@cache
def template(name: str) -> Any:
    """A template of this folder, with the escaping and the filters that every page relies on."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, signed=signed, interval=interval, duration=duration, size=size, count=count
    )
    environment.globals["marks"] = MARKS
    return environment.get_template(name)


def _curves(events: Mapping[str, Events], beside: Beside) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Per stage its panels, the first few shown and the rest folded, and every panel's numbers in the same order."""
    found: list[dict[str, Any]] = []
    readings: list[dict[str, Any]] = []
    for stage, reported in events.items():
        drawn, left_out = stage_curves(reported, MAX_PANELS)
        if not drawn:
            continue
        panels = []
        for one in drawn:
            panels.append({"figure": beside.figure(f"curve-{stage}-{one.title}", one.svg, f"{stage}: {one.title}"),
                           "number": len(readings)})  # fmt: skip
            readings.append({"stage": stage, **one.reading})
        found.append(
            {
                "stage": stage,
                "first": panels[:SHOWN_PANELS],
                "more": panels[SHOWN_PANELS:],
                "left_out": left_out,
                "averaged": _averaged(reported),
            }
        )
    return found, readings


def _averaged(events: Events) -> int:
    """How many logged steps one point stands for where the most were logged; 1 where every step is drawn."""
    return max((-(-events.logged[name] // len(events.series[name][0])) for name in events.spread), default=1)


def _failure(failed: dict[str, Any] | None) -> dict[str, Any] | None:
    """The unfinished stage's message and the end of its log."""
    if failed is None:
        return None
    tail = ""
    if failed.get("log"):
        try:
            with Path(failed["log"]).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL))
                tail = file.read().decode("utf-8", errors="replace")
        except OSError:
            tail = "(the log cannot be read)"
    mark, words = HEADS[str(failed.get("status") or "failed")]
    return {
        "stage": str(failed["stage"]),
        "running": failed.get("status") == "running",
        "mark": mark,
        "words": words,
        "message": str(failed.get("message", "")),
        "log": str(failed.get("log") or ""),
        "tail": tail,
        "pending": [str(name) for name in failed.get("pending", [])],
    }
