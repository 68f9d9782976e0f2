"""``align data show`` and ``columns``: rows as a model sees them, and the columns of a file with a recipe for them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from align.cli.arguments import find_build, find_tokenizer
from align.cli.parser import print_json
from align.config.validation import suggest
from align.data.builds.build_files import SPLITS, count_rows, kept_texts, message_text, rows, shards
from align.data.rows import Row, is_text
from align.errors import UserError, printable, shorten

if TYPE_CHECKING:
    from align.data.formats.column_guess import ColumnFacts, FileReport, Guess

TRAINED = "bold green"
SPECIAL = "cyan"
SPECIAL_TRAINED = "bold black on green"
DIM = "dim"
STYLES = {(True, True): SPECIAL_TRAINED, (True, False): SPECIAL, (False, True): TRAINED, (False, False): ""}
"""Style of a piece, by whether it is a special token and whether it is trained on."""
OPEN = "⟦"
CLOSE = "⟧"
Numbered = tuple[int, Row]

EXAMPLE = 60
"""Characters of an example value."""


def show(options: argparse.Namespace) -> int:
    """show rows as a model sees them: the rendered template, with trained tokens in color"""
    build = find_build(options.recipe, options.store, options.workers)
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split}: train or test.{suggest(options.split, SPLITS)}")
    # Only the tokenizer is loaded, not the model.
    tokenizer = find_tokenizer(options.model, options.store) if options.model else None
    if options.page:
        return _write_page(options, build.folder, build.name, tokenizer)
    if not shards(build.folder, options.split):
        raise UserError(f"{build.folder}: has no {options.split} split.")
    total = count_rows(build.folder, options.split)
    chosen = list(choose(rows(build.folder, options.split), options.rows, options.start, options.id, options.source))
    if not chosen:
        raise UserError(f"{build.folder}: {_nothing_chosen(options, total)}")
    if options.json:
        print_json([_as_json(number, row, tokenizer, options.max_length) for number, row in chosen])
        return 0
    console = Console(highlight=False, soft_wrap=True)
    printer = Printer(console, tokenizer, options.max_length)
    for number, row in chosen:
        printer.row(row, f"{options.split} row {number} of {total}")
    printer.legend()
    return 0


def choose(
    build_rows: Iterator[Row], limit: int, start: int, id_prefix: str | None = None, source: str | None = None
) -> Iterator[Numbered]:
    """Yield at most ``limit`` rows from number ``start`` on, which match ``id_prefix`` and ``source``.

    Rows are counted from 1. Raises ``UserError`` for a ``limit`` or ``start`` below 1.
    """
    if limit < 1 or start < 1:
        raise UserError("--rows and --start are at least 1; rows are counted from 1.")
    count = 0
    for number, row in enumerate(build_rows, start=1):
        if number < start or (id_prefix and not str(row.get("id", "")).startswith(id_prefix)):
            continue
        if source is not None and row.get("source") != source:
            continue
        yield number, row
        count += 1
        if count == limit:
            return


def _nothing_chosen(options: argparse.Namespace, total: int) -> str:
    """Return the message for options that match no row."""
    filters = []
    if options.id:
        filters.append(f"id {options.id}…")
    if options.source:
        filters.append(f"source '{options.source}'")
    start = f" from row {options.start} on" if options.start > 1 else ""
    if filters:
        return f"no row of {' and '.join(filters)} in its {total} {options.split} rows{start}."
    return f"its {options.split} split has {total} rows, so none{start}."


def _write_page(options: argparse.Namespace, folder: Any, name: str, tokenizer: Any) -> int:
    from pathlib import Path

    from align.data.card import read_recipe
    from align.report.dataset.preview import write_preview

    path = write_preview(
        folder, read_recipe(folder), name, Path(options.page), tokenizer=tokenizer, max_length=options.max_length
    )
    print(f"Page: {path.resolve()}")
    return 0


def _as_json(number: int, row: Row, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    from align.report.dataset.preview import token_views

    document: dict[str, Any] = {"number": number, "row": row}
    if tokenizer is not None:
        document["views"] = [
            {
                "title": view.title,
                "ids": list(view.ids),
                "trained": list(view.trained),
                "notes": list(view.notes),
                "pieces": [vars(piece) for piece in view.pieces(tokenizer)],
            }
            for view in token_views(tokenizer, row, max_length)
        ]
    return document


class Printer:
    """Prints rows to a console: as tokens if there is a tokenizer, else as messages."""

    def __init__(self, console: Console, tokenizer: Any, max_length: int | None = None) -> None:
        self.console = console
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.colored = console.color_system is not None and not console.no_color and "NO_COLOR" not in os.environ

    def row(self, row: Row, title: str) -> None:
        """Print a row below a line with its number, id and source."""
        head = f"── {title} · {row.get('id', '')} · {row.get('source', '')}"
        if self.tokenizer is None:
            self._print(Text(printable(head), DIM if self.colored else ""))
            self._messages(row)
            return
        from align.report.dataset.preview import token_views

        for view in token_views(self.tokenizer, row, self.max_length):
            counts = f"{view.title}: {len(view.ids)} tokens, {sum(view.trained)} trained on"
            self._print(Text(printable(f"{head} · {counts}"), DIM if self.colored else ""))
            for note in view.notes:
                self._print(Text(printable(f"! {note}"), "yellow" if self.colored else ""))
            self._print(self._colored(view) if self.colored else self._bracketed(view))
            self._print(Text())

    def _colored(self, view: Any) -> Text:
        text = Text()
        for piece in view.pieces(self.tokenizer):
            text.append(printable(piece.text), STYLES[piece.special, piece.trained])
        return text

    def _bracketed(self, view: Any) -> Text:
        text = Text()
        inside = False
        for piece in view.pieces(self.tokenizer):
            # A bracket opens or closes wherever training starts or stops, special tokens included.
            if piece.trained != inside:
                text.append(OPEN if piece.trained else CLOSE)
                inside = piece.trained
            text.append(printable(piece.text))
        return text.append(CLOSE) if inside else text

    def _messages(self, row: Row) -> None:
        if row.get("tools"):
            self._turn("tools", {"content": row["tools"]}, "")
        if is_text(row):
            self._turn("text", {"content": row["text"]}, TRAINED)
        for turn in row.get("prompt", []):
            self._turn(str(turn.get("role", "")), turn, "")
        for side in ("completion", "chosen", "rejected"):
            score = row.get(f"{side}_score")
            for turn in row.get(side, []):
                name = str(turn.get("role", "")) if side == "completion" else side
                self._turn(name if score is None else f"{name} ({score:g})", turn, TRAINED)
        for number, response in enumerate(row.get("responses", []), start=1):
            score = response.get("score")
            self._turn(f"response {number}" + ("" if score is None else f" ({score:g})"), response, TRAINED)
        if "label" in row:
            self._print(Text("desirable" if row["label"] else "undesirable"))
        for name, text in kept_texts(row).items():
            self._turn(name, {"content": text}, "")
        self._print(Text())

    def _turn(self, name: str, turn: dict[str, Any], style: str) -> None:
        text = Text(f"{printable(name)}: ", SPECIAL if self.colored else "")
        self._print(text.append(printable(message_text(turn)), style if self.colored else ""))

    def legend(self) -> None:
        """Print what colors or brackets mean."""
        if self.tokenizer is None:
            self._print(Text("Shown as messages; --model MODEL shows the tokens of a model.", DIM))
        elif self.colored:
            legend = Text("Trained on: ", DIM).append("this", TRAINED).append(". Special tokens: ", DIM)
            self._print(legend.append("<one>", SPECIAL).append(", trained on ", DIM).append("<one>", SPECIAL_TRAINED))
        else:
            self._print(Text(f"Trained on: {OPEN}this{CLOSE}."))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


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
        print_json(_report_json(report))
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
        count = len(report.guess.bad)
        first = report.guess.bad[0]
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


def _report_json(report: FileReport) -> dict[str, Any]:
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
