"""Rows that mean the same as an earlier one, by the cosine of their texts' embeddings. Torch-free until it starts.

Embedding similarity is not paraphrase: "buy" and "sell" are close. Look at the examples in the ledger before trusting a
threshold. Left out: rows that share their words (``near_duplicates``), which cost far less to find.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from align.config.user_paths import user_path
from align.data.compared import Of, check, parts
from align.data.components import first_stays
from align.data.rows import Row
from align.data.similar import find_similar, store
from align.data.steps.base import StepConfig, StepContext, Table, Verdict
from align.errors import UserError
from align.pipeline.registry import load_object
from align.store.fingerprint import file_digest

REASON = "means the same as an earlier row"
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")


class SemanticDuplicates(StepConfig):
    """Drop every row whose embedding is close to that of an earlier row that stays."""

    type: Literal["semantic_duplicates"]
    model: str
    """Folder of the embedding model, or its owner and name on the Hub with ``revision``. Static embeddings (model2vec,
    like minishlab/potion-base-8M) are fast; of a transformers model (all-MiniLM-L6-v2, or your own) the mean hidden
    state is taken."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The Hub model's commit, 40 hexadecimal digits."""
    of: Of = "prompt"
    """What is compared: ``prompt`` (all turns but system ones), ``reply``, or ``row`` (both)."""
    threshold: float = Field(0.9, gt=0, le=1)
    """Cosine from which two texts mean the same; what is right depends on the model."""
    max_length: int = Field(256, ge=8)
    """Tokens of a text that are read; a longer one is compared by its beginning."""
    batch_size: int = Field(64, ge=1)
    """Texts of one forward pass of a transformers model."""
    decides: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    identified: ClassVar[frozenset[str]] = frozenset({"model"})

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        folder = "/" not in self.model or self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if self.revision is not None and folder:
            raise ValueError(f"model '{self.model}' is a folder, pinned by its contents; leave `revision` out")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the model's files, or its commit."""
        if self.revision is not None:
            return {"model": f"{self.model}@{self.revision}"}
        folder = self._folder(base)
        files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
        return {f"model {path.relative_to(folder).as_posix()}": f"sha256:{file_digest(path)}" for path in files}

    def _folder(self, base: Path) -> Path:
        folder = user_path(self.model, base)
        if not (folder / "config.json").is_file():
            hint = " Of a Hub model, give `revision` too." if self.model.count("/") == 1 else ""
            raise UserError(
                f"{self.type}.model: {folder} has no config.json; name the folder of a model2vec or transformers "
                f"model.{hint}"
            )
        return folder

    def fetch(self, base: Path) -> Path:
        """The model's folder, fetched from the Hub where it is there. Raises ``UserError`` where it cannot be had."""
        if self.revision is None:
            return self._folder(base)
        import huggingface_hub

        try:
            patterns = [f"*{suffix}" for suffix in _SUFFIXES]
            return Path(huggingface_hub.snapshot_download(self.model, revision=self.revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.type}.model: {self.model} at {self.revision[:12]} could not be fetched: "
                f"{str(error).splitlines()[0]} Check the network and HF_HUB_OFFLINE, or name a folder."
            ) from error

    def start(self, context: StepContext) -> _SemanticDuplicates:
        """The step itself. Raises ``UserError`` for replies where rows have none, and for a model that is not there."""
        check(self.of, context.kind, self.type)
        return _SemanticDuplicates(self, context)


class Embed(Protocol):
    """Takes texts, returns (texts, dimensions)."""

    def __call__(self, texts: list[str]) -> np.ndarray: ...


class _SemanticDuplicates:
    def __init__(self, config: SemanticDuplicates, context: StepContext) -> None:
        self.config, self.context = config, context
        self._embed: Embed | None = None

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """``embedding`` (N, dimensions) int16."""
        if self._embed is None:
            config = self.config
            make = load_object("align.models.embeddings:make_embedder")
            folder = config.fetch(self.context.base)
            self._embed = make(folder, self.context.device, config.max_length, config.batch_size)
        assert self._embed is not None
        return {
            "embedding": store(self._embed(["\n".join(text for text, _ in parts(row, self.config.of)) for row in rows]))
        }

    def decide(self, table: Table) -> Verdict:
        """A row stays unless an earlier one that stays is close, which is then named."""
        places = np.flatnonzero(table.alive)
        vectors = table.columns["embedding"]
        if len(places) < len(table):
            vectors = vectors[places]
        found = find_similar(vectors, self.config.threshold, self._device())
        code, instead = first_stays(len(table), places, found.label)
        notes = {"dimensions": vectors.shape[1], "pairs_compared": found.compared}
        return Verdict(code, [REASON], instead, notes=notes)

    def _device(self) -> str:
        import torch

        device = self.context.device
        return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
