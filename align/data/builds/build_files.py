"""The files of a finished build: writing them, and reading rows a batch at a time. Torch-free.

A build is a folder with the Parquet shards of ``train`` and ``test``, all dropped rows, and ``ledger.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.data.rows import (
    Row,
    column_types,
    decode,
    fit_column,
    json_columns,
    kept_columns,
    merged_schema,
    split_files,
)
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
    """Return the build's ledger. Raises ``UserError`` if there is none or it is damaged."""
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
        # A damaged page raises an OSError without a number. An error with a number comes from the file system.
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
    empty = {name for name, value in item.items() if value is None} - {"content", "score", "rank"}
    return {name: value for name, value in item.items() if name not in empty}


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


FILE_ROWS = 100_000
"""Largest number of rows in one output file."""


def finish(work: Path, shards: Sequence[int], last: Path, output: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Write ``train-00000-of-0000N.parquet``, ``test-...`` and ``dropped-...``; return rows and digest of each split.

    The digest is of the rows as JSON, so it does not depend on the version of the Parquet writer.
    """
    schema = _schema(last, shards)
    counts = {}
    digests = {}
    for split in SPLITS:
        hasher = hashlib.sha256()
        tables = _tables_of_split(last, shards, split, schema)
        counts[split] = _write(output, split, _update_digest(tables, hasher), schema)
        digests[split] = hasher.hexdigest()
    # By number, since pass-10 comes after pass-9.
    passes = sorted(work.glob("pass-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [path for folder in passes for path in sorted(folder.glob("*.dropped.parquet"))]
    if files:
        _write(output, "dropped", (pq.read_table(file) for file in files), pq.read_schema(files[0]))
    return counts, digests


def _schema(last: Path, shards: Sequence[int]) -> pa.Schema:
    """Return the schema that all shards' rows fit, without the build's internal fields."""
    files = [last / f"{shard:05d}.parquet" for shard in shards]
    schema = merged_schema([pq.read_schema(file) for file in files if pq.read_metadata(file).num_rows])
    usual_order = list(column_types())
    names = [name for name in schema.names if not name.startswith("_")]
    # Known columns in their usual order, then those that steps or users added, by name.
    names.sort(key=lambda name: (usual_order.index(name) if name in usual_order else len(usual_order), name))
    return pa.schema([schema.field(name) for name in names])


def _tables_of_split(last: Path, shards: Sequence[int], split: str, schema: pa.Schema) -> Iterator[pa.Table]:
    for shard in shards:
        table = pq.read_table(last / f"{shard:05d}.parquet")
        if table.num_rows == 0:
            continue
        table = table.filter(pc.equal(table["_split"], split))
        columns = [
            fit_column(table[target.name], table.schema.field(target.name), target)
            if target.name in table.column_names
            else pa.nulls(table.num_rows, target.type)
            for target in schema
        ]
        yield pa.table(columns, schema=schema)


def _update_digest(tables: Iterator[pa.Table], hasher: hashlib._Hash) -> Iterator[pa.Table]:
    for table in tables:
        for row in table.to_pylist():
            hasher.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        yield table


def _write(output: Path, name: str, tables: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write tables into files of ``FILE_ROWS`` rows and return the rows; files get their names when all are written."""
    paths = [output / f".{name}-00000.parquet"]
    writer = pq.ParquetWriter(paths[-1], schema)
    total = 0
    room = FILE_ROWS
    for table in tables:
        start = 0
        # A table may fill the rest of one file and begin the next ones.
        while start < table.num_rows:
            if room == 0:
                writer.close()
                paths.append(output / f".{name}-{len(paths):05d}.parquet")
                writer = pq.ParquetWriter(paths[-1], schema)
                room = FILE_ROWS
            part = table.slice(start, room)
            writer.write_table(part)
            start += part.num_rows
            room -= part.num_rows
            total += part.num_rows
    writer.close()
    # The number of files is part of their names and is only known now.
    for number, path in enumerate(paths):
        path.replace(output / f"{name}-{number:05d}-of-{len(paths):05d}.parquet")
    return total
