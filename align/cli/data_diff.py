"""``align data diff``: compare two builds row by row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from align.cli.arguments import find_build
from align.cli.parser import align_columns, print_json
from align.data.builds.diff import KINDS, compare
from align.errors import printable

MAX_CELL_LENGTH = 60


def diff(options: argparse.Namespace) -> int:
    """compare two builds: rows added, removed, changed or moved between splits, and their ledgers"""
    a = find_build(options.a, options.store, options.workers)
    b = find_build(options.b, options.store, options.workers)
    comparison = compare(a.folder, b.folder, options.examples)
    if options.json:
        print_json(comparison)
        return 0
    for line in lines(comparison):
        print(line)
    return 0


def lines(comparison: dict[str, Any]) -> list[str]:
    """Return the comparison as lines that are safe to print."""
    output = [printable(f"A  {comparison['a']}"), printable(f"B  {comparison['b']}"), ""]
    if comparison["identical"]:
        return [*output, "The same rows in the same order: the digests agree."]
    if comparison["same rows"]:
        output.append("The same rows, in another order or format.")
    head = ("split", "source", "A", "B", *KINDS)
    table = [
        [group["split"], group["source"], *(_count(group[name]) for name in ("a", "b", *KINDS))]
        for group in comparison["groups"]
    ]
    output += _table(head, table, text_columns=2)
    moved = [f"{count:,} {direction}" for direction, count in comparison["moved"].items() if count]
    if moved:
        output += ["", f"Moved: {', '.join(moved)}."]
    leaked = comparison["trained_then_tested"]
    if leaked:
        subject = "prompt of A's train split is" if leaked == 1 else "prompts of A's train split are"
        output += ["", f"! {leaked:,} {subject} in B's test split: do not test a model that was trained on A with B."]
    for kind, examples in comparison["examples"].items():
        output += ["", f"{kind}:"]
        for example in examples:
            output += _example_lines(example)
    for heading in ("source", "step"):
        if comparison[f"{heading}s"]:
            output += ["", *_ledger_lines(comparison[f"{heading}s"], heading)]
    return output


def _example_lines(example: dict[str, Any]) -> list[str]:
    place = f"{example['split']} {example['id']} {example['source']}"
    before = example.get("was")
    if before and (before["split"], before["source"]) != (example["split"], example["source"]):
        place += f" (was {before['split']}, {before['source']})"
    output = [f"  {_one_line(place)}: {_one_line(example['text'])}"]
    for name, (old, new) in example.get("fields", {}).items():
        output.append(f"    {_one_line(name)}: {_one_line(old)} → {_one_line(new)}")
    return output


def _ledger_lines(entries: list[dict[str, Any]], heading: str) -> list[str]:
    """Return a table of both ledgers side by side, with the reasons of dropped rows below each entry."""
    head = (heading, "rows in A", "B", "added A", "B", "changed A", "B", "rows out A", "B", "dropped A", "B")
    table = []
    for entry in entries:
        sides = (entry["a"], entry["b"])
        cells = []
        for name in ("rows_in", "added", "changed", "rows_out"):
            cells += [_count(side[name]) if side else "-" for side in sides]
        dropped = [_count(sum(side["dropped"].values())) if side else "-" for side in sides]
        table.append([entry[heading], *cells, *dropped])
        # Use the reasons of both sides: a reason that only one build has shows as 0 in the other.
        for reason in sorted({reason for side in sides if side for reason in side["dropped"]}):
            counts = [_count(side["dropped"].get(reason, 0)) if side else "-" for side in sides]
            table.append([f"  {reason}", *[""] * 8, *counts])
    return _table(head, table, text_columns=1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Return aligned columns: the first ``text_columns`` to the left, numbers to the right.

    Columns whose numbers are all 0 are omitted, except for the first two numbers.
    """
    columns = [
        index
        for index in range(len(head))
        if index < text_columns + 2 or any(row[index] not in ("", "0") for row in rows)
    ]
    table = [[_one_line(row[index])[:MAX_CELL_LENGTH] for index in columns] for row in (head, *rows)]
    return [line.rstrip() for line in align_columns(table, text_columns)]


def _count(number: int) -> str:
    return f"{number:,}"


def _one_line(text: object) -> str:
    """Return text on one line with all characters visible; leading space stays, because it indents."""
    return printable(str(text).replace("\n", "↵").replace("\t", " "))
