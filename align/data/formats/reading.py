"""Readers of data files, plain or compressed: JSON, JSON lines, CSV, TSV and Parquet, record by record; texts as one.

Memory holds one record (a line, a row) or one small batch at a time, whatever the size of the file. A record that
cannot be read becomes a ``BadRecord`` in its place; if a file is cut off, the records before the cut count.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from align.config.validation import suggest
from align.data.formats.compressed import COMPRESSIONS, open_text
from align.data.rows import BadRecord, Record, decode, json_columns
from align.errors import UserError

Item = Record | BadRecord

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
SUFFIXES = (*(suffix + packed for suffix in _TEXT_SUFFIXES for packed in ("", *COMPRESSIONS)), ".parquet")
"""Endings of the files that can be read."""

LONGEST_LINE = 1 << 28
"""Bytes; a longer line means that the file's name is wrong about its type."""
LONGEST_CELL = 1 << 24
"""Characters of a CSV cell: a quote that is never closed would take the rest of the file as one cell."""
DEEPEST = 300
"""Levels of objects and lists in a record. Python can read some more, but then fails to write or copy them."""
TOO_DEEP = f"nested more than {DEEPEST} levels deep."
BATCH = 256
"""Rows of a Parquet file in memory."""

MOST_KEYS = 10
"""Keys of a file that an error names."""
LOST = "; nothing after it was read"


def is_readable(path: Path) -> bool:
    """Return True for a file name with a known suffix."""
    return path.name.lower().endswith(SUFFIXES)


def suggest_file(path: Path) -> str:
    """Return the readable file next to a missing one that its name most likely means, else all of them."""
    names = [file.name for file in path.parent.iterdir() if is_readable(file)] if path.parent.is_dir() else []
    return suggest(path.name, names)


def read_file(
    path: Path,
    header: Sequence[str] | None = None,
    key: str | None = None,
    *,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Iterator[Item]:
    """Yield the records of one file.

    ``header`` names the columns of a table without names in its first line; ``key`` leads to the records inside the
    object of a .json file (``data.examples``). ``delimiter`` separates the cells of a table, ``encoding`` is the text
    encoding of the file. Raises ``UserError`` for a file that cannot be opened, and for settings that its kind of file
    does not have.
    """
    name = path.name.lower()
    packed = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    kind = name.removesuffix(packed).rsplit(".", 1)[-1]
    if header is not None and kind not in _DELIMITERS:
        raise UserError(f"{path}: header names the columns of .csv and .tsv files; take it out.")
    if delimiter is not None and kind not in _DELIMITERS:
        raise UserError(f"{path}: delimiter separates the cells of .csv and .tsv files; take it out.")
    if encoding is not None and kind == "parquet":
        raise UserError(f"{path}: encoding is about text files, and Parquet has its own; take it out.")
    if key is not None and kind != "json":
        raise UserError(f"{path}: records is the key of the records in a .json file; take it out.")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    last = str(path)
    try:
        with open_text(path, packed, encoding) as file:
            for item in _open_reader(path, file, kind, header, key, delimiter):
                last = item.where if isinstance(item, BadRecord) else item[0]
                yield item
    # A truncated archive: records up to the break have been yielded, and the break is reported in its place.
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        yield BadRecord(last, _broken(packed, error))
    except OSError as error:
        if error.errno is not None or not packed:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
        yield BadRecord(last, _broken(packed, error))


def _open_reader(
    path: Path,
    file: io.BufferedReader,
    kind: str,
    header: Sequence[str] | None,
    key: str | None,
    delimiter: str | None,
) -> Iterator[Item]:
    if kind in _DELIMITERS:
        return _read_table(path, file, delimiter or _DELIMITERS[kind], header)
    if key is not None:
        return _read_list(path, file, key.split("."))
    return _READERS[kind](path, file)


def _broken(packed: str, error: Exception) -> str:
    kind = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}[packed]
    return f"from here on not a complete {kind} file ({error}){LOST}. Fetch it again."


def _lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without a byte order mark. Raises ``BadRecord`` for a line that never ends."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise BadRecord(f"{path}:{number}", f"a line of more than {LONGEST_LINE >> 20} MiB{LOST}.")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _read_jsonl(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    try:
        for number, line in _lines(path, file):
            if line.strip():
                yield _parse(line, f"{path}:{number}")
    except BadRecord as bad:
        yield bad


def _parse(line: bytes, where: str) -> Item:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(
            where, f"not UTF-8 text (byte {error.start} of the line); save it as UTF-8, or name its encoding."
        )
    except RecursionError:
        return BadRecord(where, TOO_DEEP)
    except ValueError as error:
        return BadRecord(where, f"not valid JSON: {error}. Correct or delete the line.")
    # Counting brackets is cheap, and rules out nearly every line.
    if line.count(b"[") + line.count(b"{") > DEEPEST and _is_too_deep(value):
        return BadRecord(where, TOO_DEEP)
    # UTF-8 cannot hold half of a surrogate pair, but an escape can. Only lines with such escapes are searched.
    return check_record(value, where) if b"\\ud" in line.lower() else _record(value, where)


_LONE = re.compile("[\ud800-\udfff]")


def _is_too_deep(value: Any) -> bool:
    """Return True for objects and lists nested more than ``DEEPEST`` levels; level by level, since recursion fails."""
    level = [value]
    # Breadth first: after so many steps, only a value that nests deeper has containers left.
    for _ in range(DEEPEST):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
        level = children
    return any(isinstance(item, (dict, list)) for item in level)


def check_record(value: Any, where: str) -> Item:
    """Return a record, or a ``BadRecord`` for a value without fields or with half a surrogate pair in its text."""
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
    """Read a list of records, or a record a line, as many .json files have."""
    # Peek instead of reading: the chosen reader starts at the beginning of the file.
    head = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") or not head:
        yield from _read_list(path, file)
    elif head.startswith(b"{") and (b"\n" not in head or _is_record(head.split(b"\n", 1)[0])):
        yield from _read_jsonl(path, file)
    else:
        content = "one object" if head.startswith(b"{") else "neither a list nor an object"
        hint = " Records that lie under one of its keys are read with records: KEY." if head.startswith(b"{") else ""
        yield BadRecord(str(path), f"holds {content}; expected a list of records, or a record a line.{hint}")


def _is_record(line: bytes) -> bool:
    """Return True for a line that is a complete object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
    except RecursionError:
        return True  # the reader of lines reports it


def _read_list(path: Path, file: io.BufferedReader, keys: Sequence[str] = ()) -> Iterator[Item]:
    """Read a list of records, the file itself or the one under ``keys``, which lead through its objects."""
    import ijson

    if file.peek(3)[:3] == b"\xef\xbb\xbf":
        file.read(3)
    number = 0
    try:
        for number, value in enumerate(_items(file, keys), 1):
            yield _record(value, f"{path}: record {number}")
    except LookupError as error:
        yield BadRecord(str(path), str(error))
    except (ijson.JSONError, ValueError) as error:
        message = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        reason = message.strip().splitlines()[0].rstrip(".")  # further lines quote the file
        yield BadRecord(f"{path}: record {number + 1}", f"not valid JSON: {reason}{LOST}.")


def _items(file: io.BufferedReader, keys: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the items of a list. Raises ``ValueError`` if it is nested too deeply, ``LookupError`` if there is no list.

    Not ``ijson.items``: it stores the path to every level, which exhausts memory on a file that nests without end.
    """
    import ijson

    events = ijson.basic_parse(file)
    if keys:
        _enter_list(events, keys)
    # Events of ijson: maps and arrays open and close, an item of the list is at depth 1.
    depth = int(bool(keys))
    builder = None
    for event, value in events:
        depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if depth == 0 and keys:
            return  # the list under the key has ended; the rest of the file is not needed
        # The list's own brackets belong to no record.
        if depth == 0 or (depth == 1 and builder is None and event == "start_array" and not keys):
            continue  # the list itself
        builder = builder or ijson.ObjectBuilder()
        builder.event(event, float(value) if isinstance(value, Decimal) else value)
        if depth == 1:
            yield builder.value
            builder = None


def _enter_list(events: Iterator[tuple[str, Any]], keys: Sequence[str]) -> None:
    """Read events up to the opening bracket of the list under ``keys``. Raises ``LookupError`` if there is none."""
    names: list[str] = []
    # ``depth`` counts open brackets, ``level`` the keys that were followed so far.
    depth = level = 0
    for event, value in events:
        # A key counts only in the object that the keys before it led to.
        if event == "map_key" and depth == level + 1:
            names.append(str(value))
            if value != keys[level]:
                continue
            level += 1
            if level < len(keys):
                names = []
                continue
            following = next(events, ("", None))[0]
            if following == "start_array":
                return
            raise LookupError(f"'{'.'.join(keys)}' is no list; records: names the key of a list of records.")
        depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        # The object that should have the next key has ended without it.
        if depth < level + 1 and event.startswith("end_"):
            break
    listed = ", ".join(map(repr, names[:MOST_KEYS])) or "none"
    near = suggest(keys[min(level, len(keys) - 1)], names)
    raise LookupError(f"there is no key '{'.'.join(keys)}' in it; there are {listed}.{near}")


def _read_parquet(path: Path) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
            encoded = json_columns(file.schema_arrow)
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", decode(value, encoded)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
        yield BadRecord(f"{path}: record {number + 1}", f"not a readable Parquet file ({error}){LOST}.")


def _read_table(
    path: Path, file: io.BufferedReader, delimiter: str, header: Sequence[str] | None = None
) -> Iterator[Item]:
    # Bytes that are not UTF-8 become lone surrogates, so only the row that has them is lost.
    text = (line.decode("utf-8", "surrogateescape") for _, line in _lines(path, file))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    csv.field_size_limit(LONGEST_CELL)
    names = None if header is None else list(header)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except BadRecord as bad:
            yield bad
            return
        except csv.Error as error:
            yield BadRecord(where, f"not valid CSV: {error}.")
            continue
        if not cells:
            continue
        if names is None:
            names = cells
            if len(names) == 1 and names[0].count(";") and delimiter == ",":
                raise UserError(
                    f"{path}: its first line has semicolons and no comma; write delimiter: ';' if they separate its "
                    "columns."
                )
            _check_header(path, names)
            continue
        # Fewer cells than names are fine: the missing fields are absent.
        if len(cells) > len(names):
            yield BadRecord(where, f"{len(cells)} cells, more than the header's {len(names)}.")
        elif any(_LONE.search(cell) for cell in cells):
            yield BadRecord(where, "not UTF-8 text; save the file as UTF-8, or name its encoding.")
        else:
            yield where, dict(zip(names, cells, strict=False))


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` for two columns of one name: a record would silently have only the last one."""
    counts = Counter(name for name in names if name)
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        places = [str(place) for place, name in enumerate(names, 1) if name == repeated]
        raise UserError(
            f"{path}: columns {' and '.join(places)} are both called '{repeated}'. Give each column of the first line "
            "a name of its own."
        )


def _read_document(path: Path, file: io.BufferedReader) -> Iterator[Item]:
    """Read a plain text: the file is the field ``text`` of one record."""
    content = file.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        yield BadRecord(str(path), f"a text of more than {LONGEST_LINE >> 20} MiB. Cut it into several files.")
        return
    try:
        yield str(path), {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield BadRecord(str(path), f"not UTF-8 text (byte {error.start}); save it as UTF-8, or name its encoding.")


_DELIMITERS = {"csv": ",", "tsv": "\t"}
_READERS: dict[str, Callable[[Path, io.BufferedReader], Iterator[Item]]] = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "txt": _read_document,
    "md": _read_document,
}
