"""Read a checkpoint's tensors from disk one at a time, so that several models need not fit in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from align.errors import UserError
from align.models.files import weight_files
from align.models.tuning.stored import FOLDER, is_stored, stored_tuning

HEAD = "lm_head.weight"


class Weights:
    """Tensors of a model folder by name, read on access."""

    def __init__(self, folder: Path, label: str) -> None:
        """Open a folder, called ``label`` in messages. Raises ``UserError`` where an adapter is stored in it."""
        self.folder, self.label = folder, label
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / FOLDER).is_dir():
            raise UserError(
                f"{label} carries an adapter that is no part of its weights ({self._method()}), so its weights are "
                "those of its base. Merge checkpoints of methods that fold into the weights (docs/methods.md)."
            )
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self.tied = bool(self.config.get("tie_word_embeddings", False)) and "score.weight" not in self._files
        # A tied head may be written beside the embeddings or left out; it is one tensor either way.
        self.names = {name for name in self._files if not (self.tied and name == HEAD)}

    def _method(self) -> str:
        if is_stored(self.folder):
            return stored_tuning(self.folder).label
        return "prefix, sequential adapters or LLaMA-Adapter"

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""
        with safe_open(self._files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())
