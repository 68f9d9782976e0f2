"""Check a model folder, an adapter's folder or a GGUF file before any library reads it. Torch-free and fast.

Reads JSON files and the headers of weights, no tensor. Left out: comparing the weights' shapes with the config, which
needs transformers (``pretrained.py``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.config_checks import check_config
from align.models.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    files_read,
    read_object,
    refuse_links,
    weight_files,
)
from align.models.headers import BadHeader, Entry, read_header
from align.models.tokenizer_checks import check_tokenizer

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
ADAPTER_CODE = (
    *("adapters", "cache_file", "corda_config", "covariance_file", "lora_ga_config", "megatron_config"),
    *("prompt_tuning_init_state_dict_path", "shadow_model", "tokenizer_name_or_path"),
)
"""Fields of an ``adapter_config.json`` by which peft imports modules or opens other files and folders."""
BUILT = "mirror"
"""Value of ``shadow_model`` for which peft builds a model and opens none."""
MIXTURE = "XLORA"
"""peft's type that loads other adapters, pickled ones too, from folders of its own."""


def check_folder(folder: Path) -> None:
    """Raise ``UserError`` for a model folder with a file that is damaged, hostile or another model's.

    The result is cached in the process until a file changes.
    """
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{folder}: holds an adapter without its base model. A `model` stage merges it: `source: {folder}`."
            )
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no transformers model folder. Name one that is.")
    # Names, sizes, times and inodes of all files: the cache key of the check.
    signature = tuple((name, *_state(file)) for name, file in files_read(folder).items())
    _check(folder, signature)


def _state(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=256)
def _check(folder: Path, signature: tuple[Any, ...]) -> None:
    refuse_links(folder)
    entries = tensor_entries(folder)
    check_config(folder, len(entries))
    rows = next((entry.shape[0] for name, entry in entries.items() if name.endswith(EMBEDDINGS) and entry.shape), None)
    check_tokenizer(folder, rows)


def tensor_entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a model folder by name, from the headers. Raises ``UserError`` for a damaged file."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        try:
            header = read_header(file)
        except (BadHeader, OSError) as error:
            raise UserError(f"{file}: {error}. Fetch the model again.") from None
        twice = sorted(entries.keys() & header.keys())
        if twice:
            raise UserError(f"{file}: holds {twice[0]}, which another file of the model holds as well.")
        entries |= header
    weights = [entry for name, entry in entries.items() if name.endswith("weight")]
    quantized = next((entry for entry in weights if entry.dtype not in FLOATS), None)
    if quantized is not None:
        raise UserError(
            f"{folder}: its tensor {quantized.name} is of type {quantized.dtype}, so the weights are quantized; align "
            "reads float weights. Name the model that it was quantized from."
        )
    return entries


def check_adapter(adapter: Path) -> None:
    """Raise ``UserError`` for an adapter's folder that is damaged, or that makes peft import or open other files."""
    file = adapter / ADAPTER_CONFIG
    refuse_links(adapter)
    settings = read_object(file)
    if settings.get("peft_type") == MIXTURE:
        raise UserError(
            f"{file}: peft_type {MIXTURE} loads adapters of other folders, which is not done here. Name one."
        )
    for name in ADAPTER_CODE:
        if settings.get(name) not in (None, "", BUILT, [], {}):
            raise UserError(f"{file}: {name} names code or files to load, which is not done here. Remove the line.")
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = " and only pickled weights, which run code when opened" if list(adapter.glob("*.bin")) else ""
        raise UserError(f"{adapter}: holds no {weights.name}{pickled}. Save the adapter again with peft.")
    try:
        read_header(weights)
    except BadHeader as error:
        raise UserError(f"{weights}: {error}. Fetch the adapter again.") from None


def check_gguf(gguf: Path) -> None:
    """Raise ``UserError`` for a file that is not a GGUF, or whose header counts more entries than fit into the file."""
    with gguf.open("rb") as opened:
        head = opened.read(24)
    if head[:4] != b"GGUF":
        raise UserError(f"{gguf}: begins with {head[:4]!r} instead of b'GGUF', so it is no GGUF file. Fetch it again.")
    # A tensor's entry takes at least 24 bytes and a field at least 12, so huge counts cannot be true.
    total = gguf.stat().st_size
    tensors, fields = (int.from_bytes(head[start : start + 8], "little") for start in (8, 16))
    if len(head) < 24 or tensors * 24 + fields * 12 > total or not tensors:
        raise UserError(f"{gguf}: has {total} bytes, too few for the tensors and fields in its header. Fetch it again.")
