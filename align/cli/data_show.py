"""``align data show``: rows in a terminal as the model will see them.

Tokens a loss is taken on are green, special tokens have a color; without colors (``NO_COLOR``, a pipe) trained runs
stand in ⟦brackets⟧. Text of a dataset never reaches the terminal raw.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from align.cli.arguments import find_build, find_tokenizer
from align.cli.parser import print_json
from align.config.validation import suggest
from align.data.built import SPLITS, count_rows, message_text, rows, shards
from align.data.rows import Row, is_text
from align.errors import UserError, printable

TRAINED, SPECIAL, SPECIAL_TRAINED, QUIET = "bold green", "cyan", "bold black on green", "dim"
OPEN, CLOSE = "⟦", "⟧"
Numbered = tuple[int, Row]


def show(options: argparse.Namespace) -> int:
    """print rows as the model will see them: the rendered template, trained tokens in color"""
    build = find_build(options.recipe, options.store, options.workers)
    if options.split not in SPLITS:
        raise UserError(f"--split {options.split}: train or test.{suggest(options.split, SPLITS)}")
    tokenizer = find_tokenizer(options.model, options.store) if options.model else None
    if options.page:
        return _page(options, build.folder, build.name, tokenizer)
    if not shards(build.folder, options.split):
        raise UserError(f"{build.folder}: has no {options.split} split.")
    total = count_rows(build.folder, options.split)
    chosen = list(choose(rows(build.folder, options.split), options.rows, options.start, options.id, options.source))
    if not chosen:
        raise UserError(f"{build.folder}: {_nothing(options, total)}")
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
    found: Iterator[Row], most: int, start: int, name: str | None = None, source: str | None = None
) -> Iterator[Numbered]:
    """At most ``most`` rows from number ``start`` (counted from 1) on, whose id begins and source is as asked."""
    if most < 1 or start < 1:
        raise UserError("--rows and --start are at least 1; rows are counted from 1.")
    left = most
    for number, row in enumerate(found, start=1):
        if number < start or (name and not str(row.get("id", "")).startswith(name)):
            continue
        if source is not None and row.get("source") != source:
            continue
        yield number, row
        left -= 1
        if not left:
            return


def _nothing(options: argparse.Namespace, total: int) -> str:
    wanted = [f"id {options.id}…" if options.id else "", f"source '{options.source}'" if options.source else ""]
    words = " and ".join(word for word in wanted if word)
    where = f" from row {options.start} on" if options.start > 1 else ""
    return f"no row of {words} in its {total} {options.split} rows{where}." if words else (
        f"its {options.split} split has {total} rows, so none{where}."
    )  # fmt: skip


def _page(options: argparse.Namespace, folder: Any, name: str, tokenizer: Any) -> int:
    from pathlib import Path

    from align.data.card import recipe_of
    from align.report.dataset.page import write_preview

    path = write_preview(folder, recipe_of(folder), name, Path(options.page), tokenizer, options.max_length)
    print(f"Page: {path.resolve()}")
    return 0


def _as_json(number: int, row: Row, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    from align.report.tokens import views

    found: dict[str, Any] = {"number": number, "row": row}
    if tokenizer is not None:
        found["views"] = [
            {
                "title": view.title,
                "ids": list(view.ids),
                "trained": list(view.trained),
                "notes": list(view.notes),
                "pieces": [vars(piece) for piece in view.pieces(tokenizer)],
            }
            for view in views(tokenizer, row, max_length)
        ]
    return found


class Printer:
    """Prints rows to a console, as tokens where there is a tokenizer, else as messages."""

    def __init__(self, console: Console, tokenizer: Any, max_length: int | None = None) -> None:
        self.console = console
        self.tokenizer, self.max_length = tokenizer, max_length
        self.colored = console.color_system is not None and not console.no_color and "NO_COLOR" not in os.environ

    def row(self, row: Row, title: str) -> None:
        """One row under a line that says which."""
        head = f"── {title} · {row.get('id', '')} · {row.get('source', '')}"
        if self.tokenizer is None:
            self._print(Text(printable(head), QUIET if self.colored else ""))
            self._messages(row)
            return
        from align.report.tokens import views

        for view in views(self.tokenizer, row, self.max_length):
            counts = f"{view.title}: {len(view.ids)} tokens, {sum(view.trained)} trained on"
            self._print(Text(printable(f"{head} · {counts}"), QUIET if self.colored else ""))
            for note in view.notes:
                self._print(Text(printable(f"! {note}"), "yellow" if self.colored else ""))
            self._print(self._colored(view) if self.colored else self._bracketed(view))
            self._print(Text())

    def _colored(self, view: Any) -> Text:
        text = Text()
        for piece in view.pieces(self.tokenizer):
            style = SPECIAL_TRAINED if piece.special and piece.trained else SPECIAL if piece.special else ""
            text.append(printable(piece.text), style or (TRAINED if piece.trained else ""))
        return text

    def _bracketed(self, view: Any) -> Text:
        text, inside = Text(), False
        for piece in view.pieces(self.tokenizer):
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
            self._print(Text("wanted" if row["label"] else "unwanted"))
        self._print(Text())

    def _turn(self, name: str, turn: dict[str, Any], style: str) -> None:
        text = Text(f"{printable(name)}: ", SPECIAL if self.colored else "")
        self._print(text.append(printable(message_text(turn)), style if self.colored else ""))

    def legend(self) -> None:
        """What colors or brackets mean."""
        if self.tokenizer is None:
            self._print(Text("As messages; --model MODEL shows the tokens a model is given.", QUIET))
        elif self.colored:
            legend = Text("Trained on: ", QUIET).append("this", TRAINED).append(". Special tokens: ", QUIET)
            self._print(legend.append("<one>", SPECIAL).append(", trained on ", QUIET).append("<one>", SPECIAL_TRAINED))
        else:
            self._print(Text(f"Trained on: {OPEN}this{CLOSE}."))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)
