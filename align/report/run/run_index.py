"""Writes the index of a store: a page with a row for each run and a link to its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from align.report.page.templates import STYLES, load_template, style_sheets
from align.store.artifacts import VERSION
from align.store.json_files import write_text_atomically

INDEX = "index.html"


@dataclass(frozen=True)
class IndexedRun:
    """A run as the index shows it."""

    name: str
    started: float
    """Time of the last start, in seconds since 1970."""
    stages: str
    """Number of stages by state, such as ``3 done, 1 failed``."""
    details: list[str] = field(default_factory=list)
    """A line for each stage that runs, waits or has failed."""


def write_index(runs: Sequence[IndexedRun], store: Path, folder: Path, page: str) -> Path:
    """Write ``index.html`` into ``folder`` and return its path; the run that started last comes first.

    The page of a run is the file ``page`` in the folder of its name. A run without this file has no link.
    """
    rows = [
        {
            "name": run.name,
            "link": f"{quote(run.name, safe='')}/{page}" if (folder / run.name / page).is_file() else "",
            "stages": run.stages,
            "details": run.details,
            "started": _minutes(run.started),
        }
        for run in sorted(runs, key=lambda run: -run.started)
    ]
    html = load_template("run_index.html.jinja").render(
        store=str(store.resolve()),
        runs=rows,
        written=f"{_minutes(datetime.now(UTC).timestamp())} UTC",
        style=style_sheets(*STYLES),
        version=VERSION,
    )
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / INDEX
    write_text_atomically(out, html)
    return out


def _minutes(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
