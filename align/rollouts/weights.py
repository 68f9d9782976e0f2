"""The weights of a saved checkpoint, one tensor at a time: to switch an engine from one policy to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import UserError

if TYPE_CHECKING:
    import torch


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors of a checkpoint. Raises ``UserError`` when there are none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"{model_dir} holds no safetensors; it is no model folder.")
    return files


def weight_names(model_dir: Path) -> set[str]:
    """Names of a checkpoint's tensors, from the files' headers alone."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def checkpoint_weights(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, tensor)`` of a checkpoint, on the CPU, for ``RolloutEngine.load_weights``."""
    from safetensors import safe_open

    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                yield name, opened.get_tensor(name)
