"""A trainer's state as safetensors and JSON: optimizer, scheduler and random states of a checkpoint.

transformers writes them with pickle, which an artifact must not hold: artifacts come from other machines and buckets.
``pack`` turns a checkpoint's files into ``trainer.safetensors`` and ``trainer.json``, ``unpack`` back into the files
that transformers resumes from. All other files of a checkpoint are safetensors and JSON already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_pt_utils import safe_globals

TENSORS, STRUCTURE = "trainer.safetensors", "trainer.json"
PICKLED = (".pt", ".pth")
"""Suffixes of the files that transformers writes with pickle."""
LEFT_OUT = (".bin", ".jinja", ".md", ".txt", ".model")
"""Suffixes of files that are not read on resuming: arguments, tokenizer, notes."""
TOKENIZER = ("tokenizer", "special_tokens", "vocab", "added_tokens", "merges", "preprocessor", "processor")
"""Beginnings of a tokenizer's files, which a stage reads from its own model."""


class UnknownState(Exception):
    """An optimizer's state has a value that neither JSON nor safetensors can hold."""


def is_read_on_resuming(name: str) -> bool:
    """Return True for a file of a checkpoint that resuming reads, except for the pickled files."""
    if name == "training_seconds.txt":
        return True
    return Path(name).suffix not in (*PICKLED, *LEFT_OUT) and not name.startswith(TOKENIZER)


def pack(checkpoint: Path, folder: Path) -> None:
    """Write the pickled files of ``checkpoint`` to ``folder`` as tensors and JSON. Raises ``UnknownState``."""
    tensors: dict[str, torch.Tensor] = {}
    structure = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in PICKLED:
            with safe_globals():
                # Mapped, not read: AdamW's state is twice the model's size, and it is written page by page.
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            structure[file.name] = _encode(content, file.stem, tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / STRUCTURE).write_text(json.dumps(structure), encoding="utf-8")


def unpack(folder: Path, checkpoint: Path) -> None:
    """Write the files that ``pack`` read, with equal content, to ``checkpoint``."""
    structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    with safe_open(folder / TENSORS, "pt") as tensors:
        for name, content in structure.items():
            # The names come from an artifact and must not lead out of the checkpoint's folder.
            if Path(name).name != name or Path(name).suffix not in PICKLED:
                raise UnknownState(f"{folder / STRUCTURE} names {name!r}, which is no file of a checkpoint")
            torch.save(_decode(content, tensors), checkpoint / name)


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return ``value`` as JSON, with tensors moved to ``tensors`` under their places."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[place] = _separate(value.detach().contiguous(), tensors)
        return {"tensor": place}
    if isinstance(value, np.ndarray):
        # numpy's random state is an array of uint32. Every value fits into int64.
        tensors[place] = torch.from_numpy(value.astype(np.int64))
        return {"array": place, "type": value.dtype.name}
    if isinstance(value, list):
        return [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": _encode(list(value), place, tensors)}
    if isinstance(value, dict):
        # Pairs, not an object: an optimizer's keys are numbers, which JSON would make texts.
        return {"items": [[key, _encode(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    raise UnknownState(f"{place} is a {type(value).__name__}")


def _separate(value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return ``value`` in unshared memory, which safetensors requires; it is copied only if it shares memory."""
    is_part = value.untyped_storage().nbytes() != value.nbytes
    is_shared = any(value.data_ptr() == tensor.data_ptr() for tensor in tensors.values())
    return value.clone() if is_part or is_shared else value


def _decode(value: Any, tensors: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.get_tensor(value["tensor"])
    if "array" in value:
        return tensors.get_tensor(value["array"]).numpy().astype(value["type"])
    if "tuple" in value:
        return tuple(_decode(value["tuple"], tensors))
    return {key: _decode(item, tensors) for key, item in value["items"]}
