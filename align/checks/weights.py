"""safetensors files looked at without a framework: whole or not, types, finite or not, and digests.

Their headers are read by ``align.models.headers``. Torch-free. Left out: pickled weights, which are refused elsewhere.
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

from align.models.headers import BadHeader, read_header

INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
"""The output head, at the end of its name."""
CHUNK = 1 << 22
"""Values looked at together."""
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Types that weights may have, and their bytes."""
EXPONENTS = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in NaN and in infinity, and in no other number."""


class Damaged(ValueError):
    """Files that cannot be read as weights; the message continues a sentence that begins with the folder."""


@dataclass(frozen=True)
class Tensor:
    """One tensor, by its place in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The values' bits, as unsigned integers of the type's width."""
        if self.size:
            kind = np.dtype(f"<u{WIDTHS[self.dtype]}")
            bits = np.memmap(self.file, dtype=kind, mode="r", offset=self.start, shape=(self.size,))
            for at in range(0, self.size, CHUNK):
                yield bits[at : at + CHUNK]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, from the headers. Raises ``Damaged`` for files that are missing or cut short."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Damaged("holds no safetensors")
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read(file)
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"has an index that cannot be read ({INDEX})") from None
        missing = sorted(set(listed) - set(found))
        if missing:
            raise Damaged(f"lacks {len(missing)} of {len(listed)} tensors of its index, {missing[0]} among them")
    return found


def _read(file: Path) -> dict[str, Tensor]:
    try:
        entries = read_header(file)
    except BadHeader as error:
        raise Damaged(f"has a file, {file.name}, that {error}") from None
    return {name: Tensor(name, entry.dtype, entry.shape, file, entry.start) for name, entry in entries.items()}


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN or infinity; None where there is none. Types other than floats are passed."""
    for tensor in tensors.values():
        exponent = EXPONENTS.get(tensor.dtype)
        if exponent is not None and any(bool(((bits & exponent) == exponent).any()) for bits in tensor.chunks()):
            return tensor.name
    return None


def all_zero(tensor: Tensor) -> bool:
    """Whether every value is 0 (or -0)."""
    sign = 1 << (8 * WIDTHS[tensor.dtype] - 1)
    return not any(bool((bits & (sign - 1)).any()) for bits in tensor.chunks())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    for bits in tensor.chunks():
        hasher.update(bits.tobytes())
    return hasher.hexdigest()


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of a model's weights rounded to bfloat16, so that a checkpoint and its bfloat16 copy are one base.

    An output head that repeats the embeddings is left out: some folders store it and some do not.
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in WIDTHS or (name.endswith(HEAD) and _repeats_another(tensor, tensors)):
            continue
        hasher.update(f"{name} {tensor.shape}\n".encode())
        for bits in tensor.chunks():
            hasher.update(_rounded(bits, tensor.dtype).tobytes())
    return hasher.hexdigest()


def _repeats_another(head: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Tell whether another matrix, the embeddings under whatever name, has the values of ``head`` in bfloat16."""
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
    """To bfloat16, ties to even, as bits."""
    if dtype == "BF16":
        return bits
    if dtype != "F32":
        kind = np.float64 if dtype == "F64" else np.float16
        bits = bits.view(kind).astype(np.float32).view(np.uint32)
    wide = bits.astype(np.uint64)
    rounded: NDArray[Any] = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
    return rounded
