"""Readers of a finished build: its files, its ledger, and its rows a batch at a time. Torch-free.

A build is a folder with the Parquet shards of ``train`` and ``test`` and ``ledger.json``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.rows import Row, decode, json_columns, kept_columns, split_files
from align.errors import UserError

SPLITS = ("train", "test")
LEDGER = "ledger.json"
BATCH = 1024
"""Rows in memory at once."""


def shards(folder: Path, split: str) -> list[Path]:
    """Return the existing Parquet files of a split (``train``, ``test``, ``dropped``), in order."""
    return [path for path in split_files(folder / f"{split}.parquet") if path.exists()]


def is_build(folder: Path) -> bool:
    """Return True for a folder with rows: the output of a recipe, or another stage's data."""
    return folder.is_dir() and any(shards(folder, split) for split in SPLITS)


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return the build's ledger. Raises ``UserError`` where there is none or it is damaged."""
    path = folder / LEDGER
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {LEDGER} in it, so it is not the build of a recipe.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); build the recipe again.") from None
    if not isinstance(ledger, dict) or "splits" not in ledger or "sources" not in ledger:
        raise UserError(f"{path}: not a ledger that this align reads; build the recipe again.")
    return ledger


def batches(folder: Path, split: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a split in order, as Arrow batches of at most ``BATCH`` rows, without missing columns.

    Raises ``UserError`` for a file that is damaged or no Parquet.
    """
    for path in shards(folder, split):
        with _reading(path):
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            if columns is not None:
                names = [name for name in columns if name in names]
            yield from file.iter_batches(BATCH, columns=names)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what Arrow raises for a damaged Parquet file into a ``UserError``."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        # A damaged page is an OSError without a number. One with a number comes from the file system.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: not a readable Parquet file ({error}); build the recipe again.") from None


def rows(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a split as dicts, in order, without their empty fields."""
    for batch in batches(folder, split):
        encoded = json_columns(batch.schema)
        for row in batch.to_pylist():
            yield without_empty_fields(decode(row, encoded))


def without_empty_fields(row: Row) -> Row:
    """Return a row without its empty fields, and messages without fields that only other messages use."""
    filled = {name: value for name, value in row.items() if value is not None}
    for name, value in filled.items():
        if isinstance(value, list):
            filled[name] = [_without_empty_item_fields(item) for item in value]
    return filled


def _without_empty_item_fields(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in item.items() if value is not None or name in ("content", "score", "rank")}


def message_text(message: dict[str, Any]) -> str:
    """Return a message's content and its tool calls as text for people."""
    calls = f"tool_calls: {message['tool_calls']}" if message.get("tool_calls") else ""
    return "\n".join(part for part in (str(message.get("content") or ""), calls) if part)


def kept_texts(row: Row) -> dict[str, str]:
    """Return the columns that a recipe keeps with a row as text for people: JSON for all but text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for name, value in kept_columns(row).items()
    }


def row_of_batch(batch: pa.RecordBatch, index: int) -> Row:
    """Return one row of a batch."""
    return without_empty_fields(decode(batch.slice(index, 1).to_pylist()[0], json_columns(batch.schema)))


def count_rows(folder: Path, split: str) -> int:
    """Return the number of rows of a split, from its files' footers."""
    total = 0
    for path in shards(folder, split):
        with _reading(path):
            total += pq.read_metadata(path).num_rows
    return total


def rows_by_number(folder: Path, split: str, numbers: Collection[int]) -> dict[int, Row]:
    """Return rows by their number in the split, counted from 0."""
    ordered = sorted(numbers)
    selected: dict[int, Row] = {}
    start = 0
    for batch in batches(folder, split):
        # Only the selected rows of a batch are converted to dicts.
        for number in ordered:
            if start <= number < start + batch.num_rows:
                selected[number] = row_of_batch(batch, number - start)
        start += batch.num_rows
    return selected
