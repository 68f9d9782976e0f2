"""Files of a model folder: list those that a loader reads, and refuse unsafe ones. Torch-free.

A folder is checked before any loader sees it. Weights are safetensors files inside the folder, named by
``model.safetensors.index.json`` or called ``model.safetensors``; a link may lead to another file of the folder or into
the blobs of the Hub's cache, nowhere else. Excluded: the files' contents (``folder_checks.py``).

The headers of safetensors files have the names, types and shapes of tensors. A file is 8 bytes (length of the header,
little-endian), a JSON header with type, shape and place of every tensor, and their bytes. Everything a header says is
checked against the file's size, and so are the headers of GGUF files. Excluded: the tensors' values.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.store.fingerprint import file_digest

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READ_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".bpe", ".spm"})
"""Suffixes of files that affect what the model computes; a README or an optimizer state does not."""
READ_FOLDERS = ("additional_chat_templates", "adapter")
"""Folders inside a model folder that loaders read: transformers' further templates, and an adapter of align's own."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNQUANTIZED = "Name the model that it was quantized from; `tuning: {method: qlora}` keeps that in 4 bits."
LARGEST_JSON = 64 * 2**20
"""Most bytes of a JSON file; tokenizers of 250,000 tokens need about 30 MB."""
LARGEST_TEXT = 256 * 2**20
"""Most bytes of any file that a loader may read, except weights."""


def files_read(folder: Path) -> dict[str, Path]:
    """Return every file that a loader may read, by its path below ``folder``. Keys are digests of their contents.

    Raises ``UserError`` for a pipe, a device, a link to a missing file, and a text file that is too large.
    """
    listed = {file.name: file for file in _files(folder)}
    for name in READ_FOLDERS:
        if (folder / name).is_dir():
            listed |= {f"{name}/{file.name}": file for file in _files(folder / name)}
    return dict(sorted(listed.items()))


def _files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix in READ_SUFFIXES and not file.is_dir()]
    for file in files:
        _require_readable(file)
    return files


def _require_readable(file: Path) -> None:
    """Raise ``UserError`` for anything but a regular file of bounded size. A device or a pipe may have no end."""
    try:
        status = file.stat()
    except FileNotFoundError:
        raise UserError(f"{file}: is a link to a missing file. Fetch the model again.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a pipe" if stat.S_ISFIFO(status.st_mode) else "a device or socket"
        raise UserError(f"{file}: is {kind}, or a link to one, and not a file. Fetch the model again.")
    if status.st_size > LARGEST_TEXT and file.suffix != ".safetensors":
        raise UserError(f"{file}: has {status.st_size} bytes, too many for a model's text file. Move it elsewhere.")


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file that a loader may read, by its path below ``folder``."""
    return {name: file_digest(file) for name, file in files_read(folder).items()}


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``. Raises ``UserError`` for a file that is missing, too large or no object."""
    if not os.path.lexists(file):
        raise UserError(f"{file}: there is no such file. Fetch the model again.")
    _require_readable(file)
    try:
        # Limit the read again, because files of /proc report a size of 0.
        with file.open("rb") as opened:
            data = opened.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            size = file.stat().st_size
            raise UserError(f"{file}: has {size} bytes, too many for a file of settings. Fetch the model again.")
        content = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file}: cannot be read as JSON ({detail}). Fetch the model again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}. Fetch the model again.")
    return content


def read_optional(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``; empty if there is no such file."""
    return read_object(file) if file.exists() else {}


def refuse_quantized(file: Path, config: dict[str, Any]) -> None:
    """Raise ``UserError`` with the method's name for the ``config`` of a quantized model (GPTQ, AWQ, FP8)."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UserError(f"{file}: the weights are quantized ({method or 'quantization_config'}). {UNQUANTIZED}")


def has_weights(folder: Path) -> bool:
    """Return True for a folder with a model's weights in safetensors, or with an index of them."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def is_adapter(folder: Path) -> bool:
    """Return True for a folder with a peft adapter and no weights of a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_weights(folder)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model's weights, on which every loader agrees.

    Raises ``UserError`` for an index that is damaged, names anything but safetensors of this folder, or differs from a
    ``model.safetensors`` next to it, and for a folder without weights.
    """
    single = folder / SINGLE
    index = folder / INDEX
    if not index.exists():
        if single.is_file():
            return [single]
        _refuse_no_weights(folder)
    names = _indexed(index)
    # transformers prefers model.safetensors, other loaders prefer the index.
    if single.is_file() and names != [SINGLE]:
        raise UserError(
            f"{index}: names {names[0]}, but there is also a {SINGLE}, which other loaders read. Remove the wrong one."
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{index}: names {name}, and there is no such file. Fetch the model again.")
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    """Return the files in an index, sorted. Raises ``UserError`` for any but a safetensors file next to it."""
    mapping = read_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: has no weight_map that names the tensors' files. Fetch the model again.")
    names = list(mapping.values())
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{index}: names {name!r} as a file. Fetch the model again.")
        if name.endswith(PICKLES):
            raise UserError(
                f"{index}: names {name}, pickled weights, which run code when opened; align loads safetensors only. "
                "Convert the model once with `model.save_pretrained(folder)` where you trust it."
            )
        if not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
            raise UserError(
                f"{index}: names {name}; only .safetensors files in the same folder are read. The model may be hostile."
            )
    return sorted(set(names))


def _refuse_no_weights(folder: Path) -> None:
    names = sorted(file.name for file in folder.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(PICKLES)]
    if shards:
        raise UserError(
            f"{folder}: has {shards[0]}, but neither {SINGLE} nor the index {INDEX}. Fetch the missing file."
        )
    if pickled:
        raise UserError(
            f"{folder}: holds only pickled weights ({pickled[0]}), which run code when opened; align loads safetensors "
            "only. Convert it once with `model.save_pretrained(folder)` where you trust it, and name that folder."
        )
    raise UserError(f"{folder}: holds no weights ({SINGLE}). Name a whole model folder.")


def refuse_links(folder: Path) -> None:
    """Raise ``UserError`` for a link out of the folder: its content would be copied, exported and pushed."""
    # A snapshot in the Hub's cache consists of links into the blobs folder next to it.
    inside = folder.resolve()
    blobs = (inside.parent.parent / "blobs").resolve() if inside.parent.name == "snapshots" else inside
    for name, file in files_read(folder).items():
        target = file.resolve()
        if not target.is_relative_to(inside) and target.parent != blobs:
            raise UserError(
                f"{folder / name}: is a link to {target}, outside the folder. Copy the file, or name its folder."
            )


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
    # Types smaller than a byte are packed, so bits are rounded up to bytes.
    if end - start != (math.prod(shape) * BITS[dtype] + 7) // 8:
        raise BadHeader(f"has {end - start} bytes for the tensor {name}, whose shape is {list(shape)} of {dtype}")
    return Entry(name, dtype, shape, body + start, body + end)


def _require_contiguous(entries: dict[str, Entry], body: int, total: int) -> None:
    """Check that tensors neither overlap nor leave a hole: each byte belongs to exactly one tensor."""
    position = body
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise BadHeader(f"has a header in which the tensor {entry.name} overlaps another or leaves a hole")
        position = entry.end
    if position != total:
        raise BadHeader(f"has {total} bytes and its header speaks of {position}")


GGUF_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")))
"""Number of a field's type → its format in ``struct``; 8 is text and 9 an array."""
GGUF_TEXT, GGUF_ARRAY = 8, 9
MOST_DIMENSIONS = 4
MOST_NESTED = 4
ALIGNMENT = "general.alignment"


class _GgufHeader:
    """Reads the header of a GGUF file from its bytes (by the specification in ggml): counts, fields, tensors."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def number(self, form: str) -> Any:
        """Return the next number."""
        size = struct.calcsize(f"<{form}")
        if self.position + size > len(self.data):
            raise BadHeader(f"has {len(self.data)} bytes, too few for the tensors and fields in its header")
        (value,) = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += size
        return value

    def text(self) -> str:
        """Return the next text."""
        begin = self.position + 8
        end = begin + self.number("Q")
        if end > len(self.data):
            raise BadHeader(f"has {len(self.data)} bytes and a text in its header that ends at {end}")
        self.position = end
        return self.data[begin:end].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the value of a field of this type; None for an array, which is only passed over."""
        if kind == GGUF_TEXT:
            return self.text()
        if kind != GGUF_ARRAY:
            if not GGUF_SCALARS.get(kind):
                raise BadHeader(f"has a field of the unknown type {kind} in its header")
            return self.number(GGUF_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if depth == MOST_NESTED:
            raise BadHeader("has arrays in its header that nest without end")
        if GGUF_SCALARS.get(kind):
            self.position += count * struct.calcsize(f"<{GGUF_SCALARS[kind]}")
        elif count > len(self.data) - self.position:
            raise BadHeader(f"has an array of {count} entries in its header, more than the file has bytes")
        else:
            for _ in range(count):
                self.value(kind, depth + 1)
        return None


def read_gguf_header(file: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Return the fields (arrays as None) and the tensors of a GGUF file by name, with places in the file.

    Raises ``BadHeader`` for a damaged file, and ``OSError``.
    """
    with file.open("rb") as opened:
        head = opened.read(4)
        if head != b"GGUF":
            raise BadHeader(f"begins with {head!r} instead of b'GGUF', so it is no GGUF file")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_gguf(_GgufHeader(data))


def _read_gguf(header: _GgufHeader) -> tuple[dict[str, Any], dict[str, Entry]]:
    total = len(header.data)
    header.position = 4
    version, tensors, count = header.number("I"), header.number("Q"), header.number("Q")
    if version not in (2, 3):
        raise BadHeader(f"has the version {version}, and versions 2 and 3 are read (little-endian)")
    # A tensor's entry needs at least 24 bytes and a field at least 12, so huge counts cannot be true.
    if tensors * 24 + count * 12 > total or not tensors:
        raise BadHeader(f"has {total} bytes, too few for the tensors and fields in its header")
    fields = {}
    for _ in range(count):
        name = header.text()
        fields[name] = header.value(header.number("I"))
    alignment = fields.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise BadHeader(f"has the {ALIGNMENT} {alignment!r}, which is no power of two")
    listed = [_gguf_tensor(header) for _ in range(tensors)]
    body = -(-header.position // alignment) * alignment
    entries: dict[str, Entry] = {}
    position = 0
    for name, kind, shape, offset, size in sorted(listed, key=lambda tensor: tensor[3]):
        if name in entries:
            raise BadHeader(f"has the tensor {name} twice")
        if offset % alignment or offset < position:
            raise BadHeader(f"has a header in which the tensor {name} overlaps another or is not aligned")
        position = offset + size
        if body + position > total:
            raise BadHeader(f"has {total} bytes, and its header speaks of {body + position} for the tensor {name}")
        entries[name] = Entry(name, kind, shape, body + offset, body + position)
    return fields, entries


def _gguf_tensor(header: _GgufHeader) -> tuple[str, str, tuple[int, ...], int, int]:
    """Return name, type, shape, offset and bytes of the next tensor. Its first dimension is the length of a row."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = header.text()
    dimensions = header.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise BadHeader(f"has {dimensions} dimensions for the tensor {name}; 1 to {MOST_DIMENSIONS} are possible")
    shape = tuple(header.number("Q") for _ in range(dimensions))
    number, offset = header.number("I"), header.number("Q")
    known = {int(kind): kind for kind in GGMLQuantizationType}
    if number not in known:
        raise BadHeader(f"has the tensor {name} of the unknown type {number}")
    block, size = GGML_QUANT_SIZES[known[number]]
    if not all(shape) or shape[0] % block:
        raise BadHeader(
            f"has the impossible shape {list(shape)} for the tensor {name} of type {known[number].name}, whose rows "
            f"are multiples of {block}"
        )
    return name, known[number].name, shape, offset, math.prod(shape) // block * size
