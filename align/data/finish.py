"""The output of a build: the rows of the last shards in the files of their splits, and all dropped rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.data.rows import column_types, fit_column, merged_schema
from align.data.steps.split import SPLITS

FILE_ROWS = 100_000
"""Largest number of rows in one output file."""


def finish(work: Path, shards: Sequence[int], last: Path, output: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Write ``train-00000-of-0000N.parquet``, ``test-...`` and ``dropped-...``; return rows and digest of each split.

    The digest is of the rows as JSON, so that it does not depend on the version of the Parquet writer.
    """
    schema = _schema(last, shards)
    counts, digests = {}, {}
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
    known = list(column_types())
    names = [name for name in schema.names if not name.startswith("_")]
    # Known columns in their usual order, then those that steps or users added, by name.
    names.sort(key=lambda name: (known.index(name) if name in known else len(known), name))
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
    total, room = 0, FILE_ROWS
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
