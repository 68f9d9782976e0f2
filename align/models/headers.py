"""Read headers of safetensors files: names, types and shapes of tensors.

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
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of a value by the format's types."""
LONGEST = 100_000_000
"""Most bytes of a header that the safetensors library reads."""
METADATA = "__metadata__"


class BadHeader(ValueError):
    """A damaged or incomplete safetensors file; the message continues a sentence that starts with the file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` and ``end`` count bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of ``file`` by name. Raises ``BadHeader`` for a damaged file, and ``OSError``."""
    with file.open("rb") as opened:
        total = os.fstat(opened.fileno()).st_size
        # The first 8 bytes are the length of the JSON header.
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
    # Offsets in the header count from the end of the header.
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
    """Check that tensors neither overlap nor leave a hole: each byte belongs to one of them."""
    position = body
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise BadHeader(f"has a header in which the tensor {entry.name} overlaps another or leaves a hole")
        position = entry.end
    if position != total:
        raise BadHeader(f"has {total} bytes and its header speaks of {position}")
