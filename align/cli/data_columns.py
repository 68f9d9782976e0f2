"""``align data columns``: the columns of a file, and a recipe that reads them. Has no heavy imports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import print_json
from align.errors import printable, shorten

if TYPE_CHECKING:
    from align.data.formats.column_guess import ColumnFacts, FileReport, Guess

EXAMPLE = 60
"""Characters of an example value."""


def columns(options: argparse.Namespace) -> int:
    """Print the columns with types, share filled and an example, and a recipe to paste."""
    import yaml

    from align.data.formats.column_guess import report_columns

    settings: dict[str, Any] = {"paths": options.files}
    if options.header is not None:
        settings["header"] = [name.strip() for name in options.header.split(",")]
    if options.records is not None:
        settings["records"] = options.records
    report = report_columns(settings, Path.cwd())
    if options.json:
        print_json(_as_json(report))
        return 0
    for line in _table(report):
        print(line)
    if report.guess is None and options.records is None and (key := _list_key(report)) is not None:
        print(f"\nThe records seem to lie under a key: align data columns ... --records {printable(key)}")
        return 0
    if report.guess is None:
        print("\nNo mapping fits. Name the column of each field: columns: {prompt: COLUMN, completion: COLUMN}.")
        return 0
    recipe = report.guess.recipe()
    print(f"\n# {_summary(report.guess)}")
    if report.guess.bad:
        count, first = len(report.guess.bad), report.guess.bad[0]
        print(printable(f"# Records that cannot be used: {count}; on_error: drop leaves them out. The first: {first}"))
    print(
        printable(
            yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=96, default_flow_style=None)
        ).rstrip()
    )
    return 0


def _list_key(report: FileReport) -> str | None:
    """Return the column with a list of records, of a file that is one record."""
    if report.records > 1:
        return None
    return next((facts.name for facts in report.columns if "list of mappings" in facts.types), None)


def _as_json(report: FileReport) -> dict[str, Any]:
    guess = report.guess
    return {
        "records": report.records,
        "columns": [
            {"name": facts.name, "types": dict(facts.types), "filled": facts.filled, "example": facts.example}
            for facts in report.columns
        ],
        "recipe": guess and guess.recipe(),
        "rows": guess and guess.rows,
        "dropped": guess and dict(guess.dropped),
        "bad": guess and [str(error) for error in guess.bad],
    }


def _table(report: FileReport) -> list[str]:
    """Return the lines of the table, without anything that a terminal would obey."""
    rows = [("column", "type", "filled", "example")]
    for facts in report.columns:
        types = ", ".join(name for name, _ in facts.types.most_common(3)) or "empty"
        rows.append((_cell(facts.name, 40), types, f"{facts.filled / report.records:.0%}", _example(facts)))
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return [
        f"{name:<{widths[0]}}  {types:<{widths[1]}}  {filled:>{widths[2]}}  {example}".rstrip()
        for name, types, filled, example in rows
    ]


def _example(facts: ColumnFacts) -> str:
    value = facts.example
    if value is None:
        return ""
    return _cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), EXAMPLE)


def _cell(text: str, limit: int) -> str:
    return shorten(printable(" ".join(text.split())), limit)


def _summary(guess: Guess) -> str:
    counts = f"{guess.rows} rows of the records that were looked at"
    if not guess.dropped:
        return counts
    reasons = ", ".join(f"{count} {reason}" for reason, count in guess.dropped.most_common(3))
    return printable(f"{counts}; dropped: {reasons}")
