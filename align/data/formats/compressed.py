"""Data files as streams of bytes in UTF-8, whatever their compression and encoding are."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files."""


@contextlib.contextmanager
def open_text(path: Path, packed: str, encoding: str | None) -> Iterator[io.BufferedReader]:
    """Open a file for reading.

    Args:
        path: The file.
        packed: Its compression, one of ``COMPRESSIONS``; empty if it has none.
        encoding: The encoding of its text; None for UTF-8, or if the file is no text.
    """
    with _open(path, packed) as file:
        if encoding is None:
            yield file
        else:
            transcoded: Any = _Transcoded(path, file, encoding)
            yield io.BufferedReader(transcoded, 1 << 16)


def _open(path: Path, packed: str) -> io.BufferedReader:
    raw: Any
    if packed == ".zst":
        import pyarrow as pa  # late, as below: plans look for files and read none

        raw = pa.CompressedInputStream(pa.PythonFile(path.open("rb")), "zstd")
    else:
        opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}[packed]
        raw = opener(path, "rb")
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, 1 << 16)


class _Transcoded(io.RawIOBase):
    """A text file in another encoding, read as UTF-8."""

    def __init__(self, path: Path, file: io.BufferedReader, encoding: str) -> None:
        super().__init__()
        self._path = path
        self._file = file
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A chunk may end inside a character and decode to no text, but 0 bytes would mean the end of the file.
        while not self._rest:
            chunk = self._file.read(1 << 16)
            try:
                self._rest = self._decoder.decode(chunk, final=not chunk).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self._path}: not text of encoding {self._encoding} ({error.reason}). Correct `encoding`, or "
                    "save the file as UTF-8."
                ) from None
            if not chunk:
                break
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
