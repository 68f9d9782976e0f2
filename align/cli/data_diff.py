"""``align data diff``: two builds side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from align.cli.arguments import find_build
from align.cli.parser import print_json
from align.data.diff import KINDS, compare
from align.errors import printable


def diff(options: argparse.Namespace) -> int:
    """compare two builds: rows added, removed, changed, moved between splits, and their ledgers"""
    a, b = (find_build(word, options.store, options.workers) for word in (options.a, options.b))
    found = compare(a.folder, b.folder, options.examples)
    if options.json:
        print_json(found)
        return 0
    for line in lines(found):
        print(line)
    return 0


def lines(found: dict[str, Any]) -> list[str]:
    """The comparison as text that is safe to print."""
    said = [printable(f"A  {found['a']}"), printable(f"B  {found['b']}"), ""]
    if found["identical"]:
        return [*said, "The same rows in the same order: the digests agree."]
    if found["same rows"]:
        said.append("The same rows, in another order or written otherwise.")
    head = ("split", "source", "A", "B", *KINDS)
    table = [
        [line["split"], line["source"], *(_n(line[name]) for name in ("a", "b", *KINDS))] for line in found["groups"]
    ]
    said += _table(head, table, words=2)
    moved = [f"{count:,} {what}" for what, count in found["moved"].items() if count]
    said += ["", f"Moved: {', '.join(moved)}."] if moved else []
    if found["trained_then_tested"]:
        count = found["trained_then_tested"]
        are = "prompt of A's train split is" if count == 1 else "prompts of A's train split are"
        said += ["", f"! {count:,} {are} in B's test split: do not test a model that was trained on A with B."]
    for kind, some in found["examples"].items():
        said += ["", f"{kind}:"]
        for example in some:
            said += _example(example)
    for word in ("source", "step"):
        if found[f"{word}s"]:
            said += ["", *_ledger(found[f"{word}s"], word)]
    return said


def _example(example: dict[str, Any]) -> list[str]:
    place = f"{example['split']} {example['id']} {example['source']}"
    was = example.get("was")
    if was and (was["split"], was["source"]) != (example["split"], example["source"]):
        place += f" (was {was['split']}, {was['source']})"
    said = [f"  {_line(place)}: {_line(example['text'])}"]
    for name, (before, after) in example.get("fields", {}).items():
        said.append(f"    {_line(name)}: {_line(before)} → {_line(after)}")
    return said


def _ledger(found: list[dict[str, Any]], word: str) -> list[str]:
    head = (word, "rows in A", "B", "added A", "B", "changed A", "B", "rows out A", "B", "dropped A", "B")
    table = []
    for line in found:
        a, b = line["a"], line["b"]
        cells = [
            _n(side[name]) if side else "-" for name in ("rows_in", "added", "changed", "rows_out") for side in (a, b)
        ]
        table.append([line[word], *cells, *(_n(sum(side["dropped"].values())) if side else "-" for side in (a, b))])
        reasons = sorted({*(a or {}).get("dropped", {}), *(b or {}).get("dropped", {})})
        for reason in reasons:
            counts = [_n(side["dropped"].get(reason, 0)) if side else "-" for side in (a, b)]
            table.append([f"  {reason}", *[""] * 8, *counts])
    return _table(head, table, words=1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Columns side by side, the first ``words`` to the left and numbers to the right; columns of nothing left out."""
    shown = [at for at in range(len(head)) if at < words + 2 or any(row[at] not in ("", "0") for row in rows)]
    table = [[_line(row[at])[:60] for at in shown] for row in (head, *rows)]
    widths = [max(len(row[at]) for row in table) for at in range(len(shown))]
    return [
        "  ".join(f"{cell:<{width}}" if shown[at] < words else f"{cell:>{width}}"
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip


def _n(number: int) -> str:
    return f"{number:,}"


def _line(text: object) -> str:
    """On one line, nothing hidden; leading space stays, it indents."""
    return printable(str(text).replace("\n", "↵").replace("\t", " "))
