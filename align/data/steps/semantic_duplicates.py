"""The ``semantic_duplicates`` step: rows with the meaning of an earlier one, by the cosine of their embeddings.

Embedding similarity is not paraphrase: "buy" and "sell" are close. Look at the examples in the ledger before you trust
a threshold. Not covered: rows that share their words (``near_duplicates``), which cost far less to find. Torch-free
until a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from align.config.recipe.step_settings import SemanticDuplicatesStep
from align.config.user_paths import user_path
from align.data.duplicates import check_part, compared_texts, first_stays
from align.data.embedding_search import find_similar, quantize
from align.data.rows import Row
from align.data.steps.base import ModelLoaders, StepContext, Table, Verdict, require_models
from align.errors import UserError
from align.store.fingerprint import file_digest

REASON = "means the same as an earlier row"
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")


def embedder_identities(config: SemanticDuplicatesStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return digests of the model's files, or its commit. Raises ``UserError`` for a folder without a model."""
    if config.revision is not None:
        return {"model": f"{config.model}@{config.revision}"}
    folder = _local_folder(config, base)
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {f"model {path.relative_to(folder).as_posix()}": f"sha256:{file_digest(path)}" for path in files}


def _local_folder(config: SemanticDuplicatesStep, base: Path) -> Path:
    folder = user_path(config.model, base)
    if not (folder / "config.json").is_file():
        hint = " Of a Hub model, give `revision` too." if config.model.count("/") == 1 else ""
        raise UserError(
            f"{config.type}.model: {folder} has no config.json; name the folder of a model2vec or transformers "
            f"model.{hint}"
        )
    return folder


def fetch_model(config: SemanticDuplicatesStep, base: Path) -> Path:
    """Return the model's folder, downloaded from the Hub where it is there. Raises ``UserError`` where that fails."""
    if config.revision is None:
        return _local_folder(config, base)
    import huggingface_hub

    try:
        # Weights in other formats (ONNX, TensorFlow) are not downloaded.
        patterns = [f"*{suffix}" for suffix in _SUFFIXES]
        return Path(huggingface_hub.snapshot_download(config.model, revision=config.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config.type}.model: {config.model} at {config.revision[:12]} could not be fetched: "
            f"{str(error).splitlines()[0]} Check the network and HF_HUB_OFFLINE, or name a folder."
        ) from error


Embed = Callable[[list[str]], np.ndarray]
"""A function from texts to vectors of shape (texts, dimensions)."""


class SemanticDuplicates:
    """Drops rows close to an earlier row. Raises ``UserError`` for replies where rows have none."""

    def __init__(self, config: SemanticDuplicatesStep, context: StepContext) -> None:
        check_part(config.of, context.kind, config.type)
        self.config, self.context = config, context
        self._embed: Embed | None = None

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``embedding`` (N, dimensions) int16. Loads the model with the first rows."""
        if self._embed is None:
            config = self.config
            models = require_models(self.context.models)
            folder = fetch_model(config, self.context.base)
            self._embed = models.make_embedder(folder, self.context.device, config.max_length, config.batch_size)
        texts = ["\n".join(text for text, _ in compared_texts(row, self.config.of)) for row in rows]
        return {"embedding": quantize(self._embed(texts))}

    def decide(self, table: Table) -> Verdict:
        """Keep a row unless an earlier one that stays is close; the dropped row names that one."""
        places = np.flatnonzero(table.alive)
        # Without a copy where every row is alive: embeddings are the largest column.
        vectors = table.columns["embedding"]
        if len(places) < len(table):
            vectors = vectors[places]
        similar = find_similar(vectors, self.config.threshold, self._device())
        code, instead = first_stays(len(table), places, similar.label)
        notes = {"dimensions": vectors.shape[1], "pairs_compared": similar.compared}
        return Verdict(code, [REASON], instead, notes=notes)

    def _device(self) -> str:
        import torch

        if self.context.device != "auto":
            return self.context.device
        return "cuda" if torch.cuda.is_available() else "cpu"
