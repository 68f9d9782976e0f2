"""Reading data files, plain or compressed, record by record: JSON, JSON lines, CSV, TSV, Parquet; a text is one record.

Memory holds one record (a line, a row) or one small batch at a time, whatever the size of the file. What cannot be read
is given as a ``BadRecord`` in its place; where a file cannot be read on, the records before count. Leaves out what
records mean.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.records import BadRecord, Record
from align.errors import UserError

Item = Record | BadRecord

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*(kind + packed for kind in TEXT for packed in PACKED), ".parquet")
"""Endings of the files that can be read."""

LONGEST_LINE = 1 << 28
"""Bytes; a longer line is a file that is not what its name says."""
LONGEST_CELL = 1 << 24
"""Characters of a CSV cell: a quote that is never closed takes all that follows for one."""
DEEPEST = 300
"""Levels of objects and lists in a record. Python reads some more, and then fails wherever one is written or copied."""
TOO_DEEP = f"nested more than {DEEPEST} levels deep."
BATCH = 256
"""Rows of a Parquet file in memory."""

LOST = "; nothing behind it was read"


def known(path: Path) -> bool:
    """Whether the name ends as that of a file that can be read."""
    return path.name.lower().endswith(SUFFIXES)


def read_file(path: Path) -> Iterator[Item]:
    """Records of one file. Raises ``UserError`` for a file that cannot be opened."""
    name = path.name.lower()
    packed = next((end for end in PACKED[1:] if name.endswith(end)), "")
    kind = name.removesuffix(packed).rsplit(".", 1)[-1]
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    last = str(path)
    try:
        with _open(path, packed) as file:
            for item in _READERS[kind](path, file):
                last = item.where if isinstance(item, BadRecord) else item[0]
                yield item
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        yield BadRecord(last, _broken(packed, error))
    except OSError as error:
        if error.errno is not None or not packed:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
        yield BadRecord(last, _broken(packed, error))


def _broken(packed: str, error: Exception) -> str:
    kind = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}[packed]
    return f"from here on not a complete {kind} file ({error}){LOST}. Fetch it again."


def _open(path: Path, packed: str) -> io.BufferedReader:
    raw: Any
    if packed == ".zst":
        raw = pa.CompressedInputStream(pa.PythonFile(path.open("rb")), "zstd")
    else:
        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}[packed]
        raw = opener(path, "rb")
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, 1 << 16)


def _lines(file: io.BufferedReader, where: Callable[[int], str]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines. Raises ``BadRecord`` for one without an end."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise BadRecord(where(number), f"a line of more than {LONGEST_LINE >> 20} MiB{LOST}.")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _read_jsonl(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    def where(number: int) -> str:
        return f"{path}:{number}"

    try:
        for number, line in _lines(file, where):
            if line.strip():
                yield _parse(line, where(number))
    except BadRecord as bad:
        yield bad


def _parse(line: bytes, where: str) -> Item:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(where, f"not UTF-8 text (byte {error.start} of the line); save it as UTF-8.")
    except RecursionError:
        return BadRecord(where, TOO_DEEP)
    except ValueError as error:
        return BadRecord(where, f"not valid JSON: {error}. Correct or delete the line.")
    if line.count(b"[") + line.count(b"{") > DEEPEST and _is_too_deep(value):
        return BadRecord(where, TOO_DEEP)
    return checked(value, where) if b"\\ud" in line.lower() else _record(value, where)


_LONE = re.compile("[\ud800-\udfff]")


def _is_too_deep(value: Any) -> bool:
    """Whether objects and lists nest more than ``DEEPEST`` levels deep; looked at level by level."""
    level = [value]
    for _ in range(DEEPEST):
        level = [whole for whole in level if isinstance(whole, (dict, list))]
        level = [item for whole in level for item in (whole.values() if isinstance(whole, dict) else whole)]
    return any(isinstance(item, (dict, list)) for item in level)


def checked(value: Any, where: str) -> Item:
    """A record, or what is wrong with it: no fields, or text with half a character, which no file can hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return BadRecord(where, TOO_DEEP)
    if _LONE.search(text):
        return BadRecord(where, "has half of a surrogate pair, which is no character.")
    return _record(value, where)


def _record(value: Any, where: str) -> Item:
    if not isinstance(value, dict):
        return BadRecord(where, f'holds {type(value).__name__} where a record was expected, like {{"prompt": "..."}}.')
    return where, value


def _read_json(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    """A list of records; or a record a line, as many a .json file has them."""
    head = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") or not head:
        yield from _read_list(path, file)
    elif head.startswith(b"{") and (b"\n" not in head or _is_record(head.split(b"\n", 1)[0])):
        yield from _read_jsonl(path, file)
    else:
        what = "one object" if head.startswith(b"{") else "neither a list nor an object"
        yield BadRecord(str(path), f"holds {what}; expected a list of records, or a record a line.")


def _is_record(line: bytes) -> bool:
    """Whether a line is an object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
    except RecursionError:
        return True  # said of its line


def _read_list(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    import ijson

    if file.peek(3)[:3] == b"\xef\xbb\xbf":
        file.read(3)
    number = 0
    try:
        for number, value in enumerate(_items(file), 1):
            yield _record(value, f"{path}: record {number}")
    except (ijson.JSONError, ValueError) as error:
        said = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        reason = said.strip().splitlines()[0].rstrip(".")  # the lines behind it show a piece of the file
        yield BadRecord(f"{path}: record {number + 1}", f"not valid JSON: {reason}{LOST}.")


def _items(file: io.BufferedReader) -> Iterator[Any]:
    """Items of a list. Raises ``ValueError`` for one that is nested more deeply than any data.

    Not ``ijson.items``: it keeps the path to every level, which takes all memory where someone nests without end.
    """
    import ijson

    depth, builder = 0, None
    for event, value in ijson.basic_parse(file):
        depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if depth == 0 or (depth == 1 and builder is None and event == "start_array"):
            continue  # the list itself
        builder = builder or ijson.ObjectBuilder()
        builder.event(event, float(value) if isinstance(value, Decimal) else value)
        if depth == 1:
            yield builder.value
            builder = None


def _read_parquet(path: Path) -> Iterator[Item]:
    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", value
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
        yield BadRecord(f"{path}: record {number + 1}", f"not a readable Parquet file ({error}){LOST}.")


def _read_table(path: Path, file: io.BufferedReader, delimiter: str) -> Iterator[Item]:
    def where(number: int) -> str:
        return f"{path}:{number}"

    # Bytes that are not UTF-8 become lone surrogates, so that only the row that has them is lost.
    text = (line.decode("utf-8", "surrogateescape") for _, line in _lines(file, where))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    csv.field_size_limit(LONGEST_CELL)
    names: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except BadRecord as bad:
            yield bad
            return
        except csv.Error as error:
            yield BadRecord(where(start), f"not valid CSV: {error}.")
            continue
        if not cells:
            continue
        if names is None:
            names = cells
            continue
        if len(cells) > len(names):
            yield BadRecord(where(start), f"{len(cells)} cells, more than the header's {len(names)}.")
        elif any(_LONE.search(cell) for cell in cells):
            yield BadRecord(where(start), "not UTF-8 text; save the file as UTF-8.")
        else:
            yield where(start), dict(zip(names, cells, strict=False))


def _read_document(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    """A plain text: the whole file is the field ``text`` of one record."""
    content = file.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        yield BadRecord(str(path), f"a text of more than {LONGEST_LINE >> 20} MiB. Cut it into several files.")
        return
    try:
        yield str(path), {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield BadRecord(str(path), f"not UTF-8 text (byte {error.start}); save it as UTF-8.")


_READERS: dict[str, Callable[[Path, io.BufferedReader], Iterator[Item]]] = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": lambda path, file: _read_table(path, file, ","),
    "tsv": lambda path, file: _read_table(path, file, "\t"),
    "txt": _read_document,
    "md": _read_document,
}
