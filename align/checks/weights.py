"""Check safetensors files without torch: completeness, types, finite values; and compute digests.

``align.models.checkpoints.files`` reads their headers. Excluded: pickled weights, which are refused elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.models.checkpoints.files import BadHeader, read_header

INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
"""End of the output head's name."""
CHUNK = 1 << 22
"""Values per read."""
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes per value of the types that weights may have."""
EXPONENTS = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in NaN and in infinity, and in no other number."""


class Damaged(ValueError):
    """Files that cannot be read as weights; the message continues a sentence that starts with the folder."""


@dataclass(frozen=True)
class Tensor:
    """Location of one tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield the values' bits, as unsigned integers of the type's width."""
        if self.size:
            kind = np.dtype(f"<u{WIDTHS[self.dtype]}")
            bits = np.memmap(self.file, dtype=kind, mode="r", offset=self.start, shape=(self.size,))
            for start in range(0, self.size, CHUNK):
                yield bits[start : start + CHUNK]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model folder, from the headers. Raises ``Damaged`` for missing or truncated files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Damaged("holds no safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"has an index that cannot be read ({INDEX})") from None
        missing = sorted(set(listed) - set(tensors))
        if missing:
            raise Damaged(f"lacks {len(missing)} of {len(listed)} tensors of its index, {missing[0]} among them")
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    try:
        entries = read_header(file)
    except BadHeader as error:
        raise Damaged(f"has a file, {file.name}, that {error}") from None
    return {name: Tensor(name, entry.dtype, entry.shape, file, entry.start) for name, entry in entries.items()}


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None. Types other than floats are skipped."""
    for tensor in tensors.values():
        exponent = EXPONENTS.get(tensor.dtype)
        if exponent is not None and any(bool(((bits & exponent) == exponent).any()) for bits in tensor.chunks()):
            return tensor.name
    return None


def all_zero(tensor: Tensor) -> bool:
    """Return True if every value is 0 (or -0)."""
    # All bits but the sign are 0 in 0 and in -0.
    sign = 1 << (8 * WIDTHS[tensor.dtype] - 1)
    return not any(bool((bits & (sign - 1)).any()) for bits in tensor.chunks())


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    for bits in tensor.chunks():
        hasher.update(bits.tobytes())
    return hasher.hexdigest()


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of a model's weights rounded to bfloat16; a checkpoint and its bfloat16 copy have the same.

    An output head that repeats the embeddings is skipped: some folders store it and some do not.
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # Types other than floats, such as buffers of indices, are not weights.
        if tensor.dtype not in WIDTHS or (name.endswith(HEAD) and _repeats_another(tensor, tensors)):
            continue
        hasher.update(f"{name} {tensor.shape}\n".encode())
        for bits in tensor.chunks():
            hasher.update(_rounded(bits, tensor.dtype).tobytes())
    return hasher.hexdigest()


def _repeats_another(head: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Return True if another matrix, such as the embeddings, has the values of ``head`` in bfloat16."""
    alike = [tensor for tensor in tensors.values() if tensor.shape == head.shape and tensor.dtype in WIDTHS]
    return any(
        all(
            np.array_equal(_rounded(ours, head.dtype), _rounded(theirs, tensor.dtype))
            for ours, theirs in zip(head.chunks(), tensor.chunks(), strict=True)
        )
        for tensor in alike
        if tensor.name != head.name
    )


def _rounded(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Round to bfloat16, ties to even, and return the bits."""
    if dtype == "BF16":
        return bits
    if dtype != "F32":
        kind = np.float64 if dtype == "F64" else np.float16
        bits = bits.view(kind).astype(np.float32).view(np.uint32)
    # Add half of the last kept bit, and one more if that bit is odd, then cut: ties go to even. In place, because
    # passes over memory are all that this costs; a carry out of the 32 bits is cut with the rest.
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype("<u2")
