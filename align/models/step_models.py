"""Models of data steps: the loaders that ``align.data`` receives, because it is below ``align.models``. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.models.checkpoints.files import digests
from align.models.pretrained import open_tokenizer


@dataclass(frozen=True)
class StepModels:
    """Implements ``align.data.steps.step.ModelLoaders``."""

    def digests(self, folder: Path) -> dict[str, str]:
        """Return the sha256 of every file of a model folder that a loader may read, by its path in it."""
        return digests(folder)

    def open_tokenizer(self, name: str, revision: str | None) -> Any:
        """Return the tokenizer of a folder, or of the Hub at a commit. Raises whatever its files cause."""
        return open_tokenizer(name, revision=revision)

    def make_scorer(self, config: Any, folder: Path, device: str) -> Any:
        """Return the function from rows to scores that a ``ScoreStep`` describes."""
        from align.models.row_scores import make_scorer

        return make_scorer(config, folder, device)

    def make_embedder(self, folder: Path, device: str, max_length: int, batch_size: int) -> Any:
        """Return the function from texts to embeddings (texts, dimensions)."""
        from align.models.row_scores import make_embedder

        return make_embedder(folder, device, max_length, batch_size)
