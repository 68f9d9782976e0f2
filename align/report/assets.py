"""What lies beside the page: every figure as an SVG file, every table as CSV and as JSON, and an index of both.

Texts in tables are other people's. In a CSV file a text that a spreadsheet would run as a formula (it begins with
``=``, ``+``, ``-``, ``@``, a tab or a line's end, plain or full-width) gets a ``'`` before it, as OWASP's page on CSV
injection advises; numbers stay numbers, negative ones too. JSON has the texts as they are, hidden characters spelled
out in both. Torch-free.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.errors import printable
from align.report.figures import standalone
from align.store.atomic_write import write_text_atomically
from align.store.json_files import DamagedFile, parse_object

FIGURES, TABLES, INDEX = "figures", "tables", "index.json"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Beginnings of a cell that Excel, LibreOffice or Google Sheets may take for a formula."""
LONGEST_NAME = 80


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its file's name without the ending, its markup for the page, and what stands below it."""

    name: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values under ``columns`` (name → heading); a value a row lacks is empty."""

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]


@dataclass
class Beside:
    """Collects the page's figures and tables while it is made, and writes them next to it."""

    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def figure(self, name: str, svg: Markup, caption: str = "") -> Figure:
        """Keep a figure under a name of its own, and return it."""
        taken = {one.name for one in self.figures}
        found = Figure(_own(file_name(name), taken), svg, caption)
        self.figures.append(found)
        return found

    def table(self, name: str, title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Table:
        """Keep a table, and return it."""
        found = Table(_own(file_name(name), {one.name for one in self.tables}), title, columns, rows)
        self.tables.append(found)
        return found

    def write(self, folder: Path) -> None:
        """Write everything under ``folder``; files of an earlier page that this one has not, by its index, go."""
        drawn = {f"{one.name}.svg": standalone(one.svg) for one in self.figures}
        _replace(folder / FIGURES, drawn, {f"{one.name}.svg": one.caption for one in self.figures})
        texts, titles = {}, {}
        for one in self.tables:
            texts[f"{one.name}.csv"], texts[f"{one.name}.json"] = as_csv(one), as_json(one)
            titles[f"{one.name}.csv"] = titles[f"{one.name}.json"] = one.title
        _replace(folder / TABLES, texts, titles)


def as_csv(table: Table) -> str:
    """The table with a header line of column names, as RFC 4180 has it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow([csv_cell(row.get(name)) for name in table.columns])
    return text.getvalue()


def csv_cell(value: Any) -> str:
    """A value as CSV has it: ``1.5``, ``-2``, ``true``, empty for None, text made harmless."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    text = printable(str(value))
    return f"'{text}" if text.startswith(FORMULA) else text


def as_json(table: Table) -> str:
    """``title``, ``columns`` (name → heading) and ``rows``; numbers that are not finite are null."""
    rows = [{name: _plain(row.get(name)) for name in table.columns} for row in table.rows]
    body = {"title": printable(table.title), "columns": dict(table.columns), "rows": rows}
    return json.dumps(body, ensure_ascii=False, indent=1) + "\n"


def file_name(text: str) -> str:
    """``text`` as a file's name on any system, without an ending: letters, digits, ``_``, ``-`` and inner dots."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")
    return name[:LONGEST_NAME].rstrip("-.").lower() or "unnamed"


def _own(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else printable(str(value))


def _replace(folder: Path, texts: Mapping[str, str], titles: Mapping[str, str]) -> None:
    index = folder / INDEX
    try:
        earlier = parse_object(index.read_bytes())
    except (OSError, DamagedFile):
        earlier = {}
    if not texts and not earlier:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    for name in earlier:
        if name not in texts and Path(name).name == name and name.endswith((".svg", ".csv", ".json")):
            (folder / name).unlink(missing_ok=True)
    write_text_atomically(index, json.dumps({name: printable(titles[name]) for name in texts}, indent=1) + "\n")
