"""A model folder, an adapter's folder or a GGUF file, looked at before any library sees it. Torch-free and fast.

Files are parsed and headers of weights are read; no tensor is. Left out: whether the weights have the shapes that the
config asks for, which needs transformers (``pretrained.py``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.config_checks import check_config
from align.models.files import CONFIG, files_read, read_object, refuse_links, weight_files
from align.models.headers import BadHeader, Entry, read_header
from align.models.tokenizer_checks import check_tokenizer

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CODE = ("megatron_config", "corda_config", "lora_ga_config", "prompt_tuning_init_state_dict_path")
"""Fields of an ``adapter_config.json`` by which peft imports modules or opens other files."""


def check_folder(folder: Path) -> None:
    """Raise ``UserError`` for a model folder with a file that is damaged, hostile or not this model's.

    Headers of weights are read, no tensor is. Looked at once in a process while its files stay as they are.
    """
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: holds an adapter without its base model. Merge them first by `align export`.")
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no transformers model folder. Name one that is.")
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
    """The tensors of a model folder by name, from the headers. Raises ``UserError`` for a file that is damaged."""
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
    odd = next(
        (entry for name, entry in entries.items() if entry.dtype not in FLOATS and name.endswith("weight")), None
    )
    if odd is not None:
        raise UserError(
            f"{folder}: its tensor {odd.name} is of type {odd.dtype}, so the weights are quantized; align reads float "
            "weights. Name the model that it was quantized from."
        )
    return entries


def check_adapter(adapter: Path) -> None:
    """Raise ``UserError`` for an adapter's folder that is damaged, or that has peft import or open other things."""
    file = adapter / "adapter_config.json"
    settings = read_object(file)
    for name in ADAPTER_CODE:
        if settings.get(name):
            raise UserError(f"{file}: {name} names code or files to load, which is not done here. Remove the line.")
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = " and only pickled weights, which run code when opened" if list(adapter.glob("*.bin")) else ""
        raise UserError(f"{adapter}: holds no {weights.name}{pickled}. Save the adapter anew by peft.")
    refuse_links(adapter)
    try:
        read_header(weights)
    except BadHeader as error:
        raise UserError(f"{weights}: {error}. Fetch the adapter again.") from None


def check_gguf(gguf: Path) -> None:
    """Raise ``UserError`` for a file that is no GGUF, or whose header counts more entries than the file has bytes."""
    with gguf.open("rb") as opened:
        head = opened.read(24)
    if head[:4] != b"GGUF":
        raise UserError(f"{gguf}: begins with {head[:4]!r} instead of b'GGUF', so it is no GGUF file. Fetch it again.")
    total = gguf.stat().st_size
    tensors, fields = (int.from_bytes(head[start : start + 8], "little") for start in (8, 16))
    if len(head) < 24 or tensors * 24 + fields * 12 > total or not tensors:
        raise UserError(f"{gguf}: has {total} bytes, too few for the tensors and fields in its header. Fetch it again.")
