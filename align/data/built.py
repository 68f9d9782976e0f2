"""Reading a finished build: its files, its ledger, and its rows a batch at a time. Torch-free.

A build is a folder with the Parquet shards of ``train`` and ``test`` and ``ledger.json``. Leaves out looking for builds
by recipe or key, which is the command line's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.rows import Row, split_files
from align.errors import UserError

SPLITS = ("train", "test")
LEDGER = "ledger.json"
BATCH = 1024
"""Rows in memory at once."""


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split (``train``, ``test``, ``dropped``) that are there, in order."""
    return [path for path in split_files(folder / f"{split}.parquet") if path.exists()]


def is_build(folder: Path) -> bool:
    """Whether ``folder`` holds rows: the output of a recipe, or another stage's data."""
    return folder.is_dir() and any(shards(folder, split) for split in SPLITS)


def read_ledger(folder: Path) -> dict[str, Any]:
    """The build's ledger. Raises ``UserError`` where there is none or it is damaged."""
    path = folder / LEDGER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {LEDGER} in it, so not what a recipe built.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); build the recipe again.") from None
    if not isinstance(found, dict) or "splits" not in found or "sources" not in found:
        raise UserError(f"{path}: not a ledger that this align reads; build the recipe again.")
    return found


def batches(folder: Path, split: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a split in order, as Arrow batches of at most ``BATCH`` rows; columns that a file lacks are left out.

    Raises ``UserError`` for a file that is no Parquet.
    """
    for path in shards(folder, split):
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names if columns is None else [n for n in columns if n in file.schema_arrow.names]
            yield from file.iter_batches(BATCH, columns=names)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Parquet file ({error}); build the recipe again.") from None


def rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a split as dicts, in order, without the fields that are empty in them."""
    for batch in batches(folder, split):
        yield from map(tidy, batch.to_pylist())


def tidy(row: Row) -> Row:
    """A row without the fields that are empty in it, messages without those that are there for others only."""
    return {
        name: [_tidy_item(item) for item in value] if isinstance(value, list) else value
        for name, value in row.items()
        if value is not None
    }


def _tidy_item(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in item.items() if value is not None or name in ("content", "score", "rank")}


def message_text(message: dict[str, Any]) -> str:
    """A message's content and the calls of tools in it, to read."""
    calls = f"tool_calls: {message['tool_calls']}" if message.get("tool_calls") else ""
    return "\n".join(part for part in (str(message.get("content") or ""), calls) if part)


def row_of(batch: pa.RecordBatch, at: int) -> Row:
    """One row of a batch."""
    return tidy(batch.slice(at, 1).to_pylist()[0])


def count_rows(folder: Path, split: str) -> int:
    """How many rows a split has, from its files' footers."""
    return sum(pq.read_metadata(path).num_rows for path in shards(folder, split))


def rows_at(folder: Path, split: str, places: Collection[int]) -> dict[int, Row]:
    """Rows by their number in the split, counted from 0."""
    wanted = sorted(places)
    found: dict[int, Row] = {}
    start = 0
    for batch in batches(folder, split):
        for place in wanted:
            if start <= place < start + batch.num_rows:
                found[place] = row_of(batch, place - start)
        start += batch.num_rows
    return found
