"""Reading a recipe's sources: raw records with the place each came from, and the identity of each source.

Local files by glob (JSON, JSON lines, Parquet, CSV; .gz allowed for the text ones) and Hub datasets at a commit.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.source_configs import FilesSource, HubSource
from align.errors import UserError
from align.fingerprint import file_digest
from align.validation import suggest

Record = tuple[str, dict[str, Any]]
"""Where a record stands (``file:line``) and its fields."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")


def find_files(patterns: list[str], base: Path) -> list[Path]:
    """Files behind paths and globs, in sorted order, each once. Raises ``UserError`` for one that finds nothing."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(Path(name) for name in glob.glob(str(base / Path(pattern).expanduser()), recursive=True))
        files = [path for path in matches if path.is_file()]
        if not files:
            raise UserError(f"no file matches '{pattern}' (looked from {base}).{_neighbours(base / pattern)}")
        for path in files:
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            found[path] = None
    return list(found)


def _neighbours(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir() if p.name.endswith(SUFFIXES)] if path.parent.is_dir() else []
    return suggest(path.name, names)


def identity(source: FilesSource, base: Path) -> dict[str, str]:
    """sha256 of every file, by name; the folder does not matter. Raises ``UserError`` for a missing file."""
    found: dict[str, str] = {}
    for path in find_files(source.paths, base):
        name, number = path.name, 2
        while name in found:
            name, number = f"{path.name} ({number})", number + 1
        found[name] = f"sha256:{file_digest(path)}"
    return found


def read_files(source: FilesSource, base: Path) -> Iterator[Record]:
    """Records of all files. Raises ``UserError`` with file and line for what does not parse."""
    for path in find_files(source.paths, base):
        kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
        try:
            yield from _READERS[kind](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: not a complete gzip file ({error}); fetch it again.") from None
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Parquet file ({error}).") from None


def _open(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds {type(value).__name__} where a record (an object with fields) was expected.")
    return where, value


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not valid JSON: {error}. Correct or delete the line.") from None
                yield _record(value, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            hint = " One record a line? Name it .jsonl." if error.msg == "Extra data" else ""
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.{hint}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: holds {type(values).__name__}; expected a list of records.")
    for number, value in enumerate(values, 1):
        yield _record(value, f"{path}: record {number}")


def _read_parquet(path: Path) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield f"{path}: record {number}", value


def _read_csv(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for value in reader:
                where = f"{path}:{reader.line_num}"
                if None in value:
                    raise UserError(f"{where}: more cells than the header's {len(reader.fieldnames or [])}.")
                yield where, {str(name): cell for name, cell in value.items() if cell is not None}
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}.") from None


_READERS = {"jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet, "csv": _read_csv}


def read_hub(source: HubSource) -> Iterator[Record]:
    """Records of a Hub dataset at its commit. Raises ``UserError`` when it cannot be reached or has no such split."""
    import datasets

    place = f"the Hub dataset '{source.dataset}' at {source.revision[:12]}"
    try:
        found = datasets.load_dataset(
            source.dataset, source.config, data_dir=source.data_dir, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown config or split, loading script
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{place} could not be read: {reason}\n"
            "Check the network, HF_HUB_OFFLINE, HF_TOKEN for a gated dataset, and the recipe's config and split. To "
            "use local files instead, download them elsewhere and set the data stage's files: "
            "--set 'stages.data.files=[path/to/*.jsonl.gz]'."
        ) from error
    for number, value in enumerate(found, 1):
        yield f"{source.dataset} {source.split}: record {number}", dict(value)
