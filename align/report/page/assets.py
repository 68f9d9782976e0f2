"""Files next to a page: every figure as SVG, every table as CSV and as JSON, and an index of each folder.

Texts in tables come from models and datasets. A spreadsheet would run a text cell as a formula when it begins with
``=``, ``+``, ``-``, ``@``, a tab or a line end, plain or full-width. Such a cell gets a leading ``'`` in CSV, as
OWASP's page on CSV injection advises. Numbers stay numbers, including negative numbers. JSON keeps the texts as they
are. Hidden characters are spelled out in both. Torch-free.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.page.panels import standalone
from align.store.json_files import DamagedFile, parse_object, write_text_atomically

FIGURES = "figures"
TABLES = "tables"
INDEX = "index.json"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Beginnings of a cell that Excel, LibreOffice or Google Sheets may read as a formula."""
MAX_NAME_LENGTH = 80
TABLE_FILE = Path(__file__).with_name("tables.json")
"""Title and columns (name → heading) of each table."""
MORE_COLUMNS = "..."
"""Place in ``TABLE_FILE`` of the columns that depend on the run, such as its metrics."""


@dataclass(frozen=True)
class Figure:
    """A figure: the name of its file without the suffix, its markup for the page, and its caption."""

    name: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values under ``columns`` (name → heading); a value that a row lacks is empty."""

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]


@dataclass
class AssetWriter:
    """Collects a page's figures and tables while the page is built, then writes them next to it."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add_figure(self, name: str, svg: Markup, caption: str = "") -> Figure:
        """Add a figure under a unique file name and return it."""
        names = {figure.name for figure in self.figures}
        figure = Figure(unique_name(file_name(name), names), svg, caption)
        self.figures.append(figure)
        return figure

    def add_table(
        self, name: str, rows: Sequence[Mapping[str, Any]], more_columns: Mapping[str, str] | None = None
    ) -> None:
        """Add a table of :data:`TABLE_FILE`; ``more_columns`` are the columns that depend on the run."""
        table = _table_descriptions()[name]
        columns: dict[str, str] = {}
        for column, heading in table["columns"].items():
            columns |= (more_columns or {}) if column == MORE_COLUMNS else {column: heading}
        self.tables.append(Table(name, table["title"], columns, rows))

    def write(self, folder: Path) -> None:
        """Write all figures and tables below ``folder``.

        Files that an earlier page wrote (by its index) and this page lacks are deleted.
        """
        drawings = {f"{figure.name}.svg": (standalone(figure.svg), figure.caption) for figure in self.figures}
        _replace_files(folder / FIGURES, drawings)
        texts: dict[str, tuple[str, str]] = {}
        for table in self.tables:
            texts[f"{table.name}.csv"] = as_csv(table), table.title
            texts[f"{table.name}.json"] = as_json(table), table.title
        _replace_files(folder / TABLES, texts)


@functools.cache
def _table_descriptions() -> Any:
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def estimate_columns(names: Iterable[str]) -> dict[str, str]:
    """Return the columns of metrics and of their intervals' bounds."""
    columns: dict[str, str] = {}
    for name in names:
        columns |= {name: name, f"{name} low": f"{name} 95 % low", f"{name} high": f"{name} 95 % high"}
    return columns


def estimate_cells(name: str, estimate: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a row's cells under ``estimate_columns``; the cells are empty without an estimate."""
    bounds = estimate or {}
    return {name: bounds.get("value"), f"{name} low": bounds.get("low"), f"{name} high": bounds.get("high")}


def as_csv(table: Table) -> str:
    """Return the table as CSV (RFC 4180) with a header line of column names."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow([csv_cell(row.get(name)) for name in table.columns])
    return text.getvalue()


def csv_cell(value: Any) -> str:
    """Return a value as CSV: ``1.5``, ``-2``, ``true``; empty for None; text that no spreadsheet runs."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    text = printable(str(value))
    # A leading apostrophe makes spreadsheets show such a cell as text instead of running it.
    return f"'{text}" if text.startswith(FORMULA) else text


def as_json(table: Table) -> str:
    """Return ``title``, ``columns`` (name → heading) and ``rows`` as JSON; numbers that are not finite are null."""
    rows = [{name: _json_value(row.get(name)) for name in table.columns} for row in table.rows]
    body = {"title": printable(table.title), "columns": dict(table.columns), "rows": rows}
    return json.dumps(body, ensure_ascii=False, indent=1) + "\n"


def file_name(text: str) -> str:
    """Return ``text`` as a file name on any system, without a suffix: letters, digits, ``_``, ``-`` and inner dots."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
    return name[:MAX_NAME_LENGTH].rstrip("-.").lower() or "unnamed"


def unique_name(name: str, names: Container[str]) -> str:
    """Return ``name``, with a number behind it when ``names`` has it already."""
    number = 1
    unique = name
    while unique in names:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return printable(str(value))


def _replace_files(folder: Path, texts: Mapping[str, tuple[str, str]]) -> None:
    """Write ``texts`` (file name → content, title) and the index, and delete what only the earlier index lists."""
    index = folder / INDEX
    # The index of the earlier page says which files are ours: others in the folder stay.
    try:
        earlier = parse_object(index.read_bytes())
    except (OSError, DamagedFile):
        earlier = {}
    if not texts and not earlier:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, (text, _) in texts.items():
        write_text_atomically(folder / name, text)
    for name in earlier:
        # The index may be damaged or forged: only plain names with our suffixes are deleted.
        if name not in texts and Path(name).name == name and name.endswith((".svg", ".csv", ".json")):
            (folder / name).unlink(missing_ok=True)
    titles = {name: printable(title) for name, (_, title) in texts.items()}
    write_text_atomically(index, json.dumps(titles, indent=1) + "\n")
