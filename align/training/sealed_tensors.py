"""Tensors in a cache, with their key and a digest of their content in the file's own header.

As ``align.store.sealed`` does for JSON: a file that is damaged, or was written under another key, is no file.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

KEY, DIGEST = "key", "sha256"


def write_tensors(path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, which appears under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, draft, {KEY: key, DIGEST: _digest(key, plain)})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_tensors(path: Path, key: str, warn: Callable[[str], object]) -> dict[str, torch.Tensor] | None:
    """The tensors that were written under ``key``, on the CPU; None where there are none.

    A file that holds something else is None as well, with a warning.
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
    return tensors


def _digest(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256(key.encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
