"""Write the table of docs/models.md: families of models by kinds of training, from runs of tiny random models.

    .venv/bin/python -m tools.model_matrix              # all families, about 30 s each on one core
    .venv/bin/python -m tools.model_matrix qwen3 lfm2   # only their rows

``tests/models/test_matrix.py`` compares the table with new runs.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- matrix -->", "<!-- end of matrix -->"
NOTES = re.compile(r"\s*\[\d+\]")
VERSIONS = ("transformers", "trl", "peft", "torch")


def table_rows(page: str) -> dict[str, dict[str, str]]:
    """Return the table of the page: family -> column -> cell, without its notes."""
    lines = [line for line in page.split(START)[1].split(END)[0].splitlines() if line.startswith("|")]
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = {}
    for family, *cells in rows:
        table[family.strip("`")] = dict(zip(columns[1:], (NOTES.sub("", cell) for cell in cells), strict=True))
    return table


def row_of(cells: Mapping[str, Any]) -> dict[str, str]:
    """Return the words of a family's cells as the table has them."""
    return {column: cell.status for column, cell in cells.items()}


def write_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows, notes with the messages of refusals, and the tested versions into the page."""
    columns = list(next(iter(rows.values())))
    notes: dict[str, int] = {}
    lines = ["| family | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for family, cells in rows.items():
        texts = []
        for column in columns:
            cell = cells[column]
            number = notes.setdefault(plain_message(cell.message), len(notes) + 1) if cell.message else None
            texts.append(cell.status if number is None else f"{cell.status} [{number}]")
        lines.append(f"| `{family}` | " + " | ".join(texts) + " |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in VERSIONS)
    remarks = [f"- [{number}] {message}" for message, number in notes.items()]
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
    text = re.sub(r"of this \w+ (carry|cannot)", r"of this model \1", text)
    return re.sub(r" \(scale [\d.]+, soft cap [\w.]+\)", "", text)


def main(families: list[str]) -> None:
    """Run the cells of the families and write their rows."""
    import torch

    from tests.support import in_process
    from tests.support.models.families import FAMILIES
    from tests.support.models.matrix import CELLS, Cell, run_cell

    torch.set_num_threads(1)
    documented = table_rows(PAGE.read_text(encoding="utf-8")) if families else {}
    rows: dict[str, dict[str, Cell]] = {}
    with in_process.stages():
        for family in families or FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                rows[family] = {column: run_cell(family, column, Path(folder)) for column in (*CELLS, "memory")}
            sys.stdout.write(f"{family}: {' '.join(cell.status for cell in rows[family].values())}\n")
    if not documented.keys() <= rows.keys():
        sys.stdout.write("The page is written only when all families run.\n")
        return
    write_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
