"""Cache files of tensors, with their key and a digest of their content in the header.

Like ``align.store.json_files`` for JSON: a file that is damaged or has another key is treated as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from align.store.json_files import atomic_draft

KEY = "key"
DIGEST = "sha256"


def write_tensors(path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors of any shape to a safetensors file, which gets its name once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_draft(path) as draft:
        save_file(cpu_tensors, draft, {KEY: key, DIGEST: _digest(key, cpu_tensors)})


def read_tensors(
    path: Path, key: str, names: Collection[str], rows: int, warn: Callable[[str], object]
) -> dict[str, torch.Tensor] | None:
    """Return the tensors that were written under ``key``, in their shapes, on the CPU; None for a missing file.

    A damaged file or another key also gives None, with a warning; so do other names or numbers of rows, without one.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        warn(f"{path} cannot be read ({error}); its result is computed again")
        return None
    if header.get(KEY) != key:
        warn(f"{path} was written under another key; its result is computed again")
        return None
    if header.get(DIGEST) != _digest(key, tensors):
        warn(f"{path} is not what was written there; its result is computed again")
        return None
    is_valid = tensors.keys() == set(names) and all(len(tensor) == rows for tensor in tensors.values())
    return tensors if is_valid else None


def _digest(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256(key.encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # View as bytes, because numpy has no bfloat16.
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
