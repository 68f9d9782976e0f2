"""Jinja templates of ``align/report/templates``, what every page has around its content, and the index of all runs.

HTML is escaped by Jinja's autoescape, and by ``textContent`` in the page's scripts. Invisible and reordering characters
are shown as escape sequences. Torch-free.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from align.errors import printable
from align.report.page.number_format import MARKS, count, duration, interval, number, signed, size
from align.store.artifacts import VERSION
from align.store.json_files import write_text_atomically

FOLDER = Path(__file__).parents[1] / "templates"
SCRIPTS = ("samples.js", "curves.js", "curve_view.js", "scroll.js", "refresh.js")
DARK = "dark.css"
STYLES = ("page.css", DARK)
DARK_SCREEN = "@media screen and (prefers-color-scheme: dark) {{\n{}}}"
"""Media query around the dark colors; print stays light."""


def page_shell(title: str) -> dict[str, Any]:
    """Return the parts around the content of a page with the script: heading, date, style, script and its hash.

    The page's content security policy allows only the script with this hash.
    """
    script = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return {
        "title": title,
        "version": VERSION,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": style_sheets(*STYLES),
        "script": Markup(script),  # noqa: S704  (our own file)
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def style_sheets(*names: str) -> Markup:
    """Return the style sheets ``names`` as one text for a ``<style>`` element."""
    sheets = []
    for name in names:
        sheet = (FOLDER / name).read_text(encoding="utf-8")
        sheets.append(DARK_SCREEN.format(sheet) if name == DARK else sheet)
    return Markup("\n".join(sheets))  # noqa: S704  (our own files)


@cache
def load_template(name: str) -> Template:
    """Return a template with the escaping and the filters that every page relies on.

    Autoescape makes markup of texts harmless, ``finalize`` spells out hidden characters, and a name that the page does
    not define is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Filters turn numbers into text; everything that they return is escaped like any other text.
    environment.filters.update(
        number=number, signed=signed, interval=interval, duration=duration, size=size, count=count
    )
    environment.globals["marks"] = MARKS
    return environment.get_template(name)


def finalize(value: Any) -> Any:
    """Return a template's value with its text made printable; ``Markup`` is trusted and stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value)


def script_json(value: Any) -> Markup:
    """Return JSON for a ``<script type="application/json">`` element; no character in it can end the element."""
    text = json.dumps(_make_printable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  (escaped above)


def _make_printable(value: Any) -> Any:
    """Return nested ``value`` with every text and key made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _make_printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_make_printable(item) for item in value]
    return value


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
