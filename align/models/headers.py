"""Headers of safetensors files: names, types and shapes of tensors, without reading one.

A file is 8 bytes (length of the header, little-endian), a JSON header with type, shape and place of every tensor, and
their bytes. Everything a header says is checked against the file's size. Torch-free. Left out: the tensors' values.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Types of the format, and the bits of a value."""
LONGEST = 100_000_000
"""Bytes of a header that the safetensors library reads at most."""
METADATA = "__metadata__"


class BadHeader(ValueError):
    """A file that is no whole safetensors file; the message continues a sentence that begins with the file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` and ``end`` count bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of ``file`` by name. Raises ``BadHeader`` for a file that is damaged, and ``OSError``."""
    with file.open("rb") as opened:
        total = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= total - 8:
            raise BadHeader(f"has {total} bytes and begins with no header of safetensors")
        if length > LONGEST:
            raise BadHeader(f"has a header of {length} bytes, more than the {LONGEST} that safetensors allows")
        text = opened.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BadHeader(f"has {total} bytes and begins with no header of safetensors that can be read") from None
    if not isinstance(header, dict):
        raise BadHeader("has a header that is no JSON object")
    body = 8 + length
    entries = {name: _entry(name, value, body) for name, value in header.items() if name != METADATA}
    _require_contiguous(entries, body, total)
    return entries


def _entry(name: str, value: Any, body: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadHeader(f"has a header that does not describe the tensor {name}") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise BadHeader(f"has a header with an impossible shape or place of the tensor {name}")
    if dtype not in BITS:
        raise BadHeader(f"has the tensor {name} of the unknown type {dtype!r}")
    if end - start != (math.prod(shape) * BITS[dtype] + 7) // 8:
        raise BadHeader(f"has {end - start} bytes for the tensor {name}, whose shape is {list(shape)} of {dtype}")
    return Entry(name, dtype, shape, body + start, body + end)


def _require_contiguous(entries: dict[str, Entry], body: int, total: int) -> None:
    """The format leaves no hole between tensors and lets none overlap: each byte belongs to one of them."""
    position = body
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise BadHeader(f"has a header in which the tensor {entry.name} overlaps another or leaves a hole")
        position = entry.end
    if position != total:
        raise BadHeader(f"has {total} bytes and its header speaks of {position}")
