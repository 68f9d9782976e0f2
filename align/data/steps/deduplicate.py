"""The steps ``exact_duplicates``, ``near_duplicates`` and ``semantic_duplicates``: the first row of each cluster stays.

- Exact duplicates are equal except for case, punctuation and white space.
- Near-duplicates have nearly the same words (MinHash, :mod:`align.data.minhash`).
- Semantic duplicates have the meaning of an earlier row, by the cosine of their embeddings
  (``align.models.row_scores``). Similarity is not paraphrase: "buy" and "sell" are close. Look at the examples in the
  ledger before you trust a threshold.

The search for similar embeddings is exact, in blocks, in bounded memory. Every row is compared with all earlier rows
that stay, so a dropped row is always close to the row that stays for it. The work grows with the square of the rows
that stay. Embeddings are stored as 16-bit integers. If a product of floats is too close to the threshold, integers
decide, so every machine and every number of threads gives the same verdict. Torch-free until a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.config.recipe.step_settings import (
    ComparedPart,
    ExactDuplicatesStep,
    NearDuplicatesStep,
    SemanticDuplicatesStep,
)
from align.config.user_paths import user_path
from align.data import minhash
from align.data.minhash import check_part, compared_texts, comparison_key, first_equal, first_stays
from align.data.ngrams import Sets, read_sets
from align.data.rows import Row
from align.data.steps.step import ModelLoaders, StepContext, Table, Verdict, require_models
from align.errors import UserError
from align.store.fingerprint import file_digest

if TYPE_CHECKING:
    import torch


DUPLICATE = "duplicate of an earlier row"


class ExactDuplicates:
    """Drops rows whose text equals an earlier row's. Raises ``UserError`` for replies where rows have none."""

    def __init__(self, config: ExactDuplicatesStep, context: StepContext) -> None:
        check_part(config.of, context.kind, config.type)
        self.part = config.of

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``key`` (N, 2) uint64, 128 bits of each row's text.

        Two different texts of a million have the same key with a probability of 1e-27.
        """
        keys = [comparison_key(row, self.part) for row in rows]
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        return {"key": np.frombuffer(digests, dtype="<u8").reshape(len(rows), 2).copy()}

    def decide(self, table: Table) -> Verdict:
        """Keep the first of equal rows; the dropped ones name it."""
        places = np.flatnonzero(table.alive)
        # Both halves of a key as one structured value, which ``np.unique`` can compare.
        keys = table.columns["key"][places].view([("high", "<u8"), ("low", "<u8")])[:, 0]
        code, instead = first_stays(len(table), places, first_equal(keys))
        return Verdict(code, [DUPLICATE], instead)


NEAR = "near-duplicate of an earlier row"
SHINGLES: dict[ComparedPart, int] = {"prompt": minhash.SHINGLE, "reply": 5, "row": 5}


class NearDuplicates:
    """Drops rows similar to an earlier row. Raises ``UserError`` for replies where rows have none."""

    def __init__(self, config: NearDuplicatesStep, context: StepContext) -> None:
        check_part(config.of, context.kind, config.type)
        self.config = config
        self.shingle = config.shingle or SHINGLES[config.of]

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``signature`` (N, permutations) uint8 and ``whole`` (N,) uint64, a hash of all words."""
        texts = [compared_texts(row, self.config.of) for row in rows]
        signature, text_hash = minhash.sketch(texts, shingle=self.shingle, permutations=self.config.permutations)
        return {"signature": signature, "whole": text_hash}

    def decide(self, table: Table) -> Verdict:
        """Keep the first row of each cluster; the dropped ones name it."""
        places = np.flatnonzero(table.alive)
        text_hash = table.columns["whole"][places]
        # Signatures are the largest column, so they are copied only if some rows are gone.
        signature = table.columns["signature"]
        if len(places) < len(table):
            signature = signature[places]

        def read(rows: np.ndarray) -> Sets:
            # The search numbers the rows that are left. ``places`` turns these into numbers of the table.
            texts = (compared_texts(row, self.config.of) for row in table.rows(places[rows]))
            return read_sets(rows, texts, self.shingle)

        clusters = minhash.find_clusters(signature, text_hash, self.config.threshold, self.config.recall, read)
        code, instead = first_stays(len(table), places, clusters.label)
        # Rows with all the words of their cluster's first row get their own reason.
        equal = places[text_hash[clusters.label] == text_hash]
        code[equal[code[equal] == 0]] = 1
        return Verdict(code, [NEAR, DUPLICATE], instead, notes=self._notes(clusters))

    def _notes(self, clusters: minhash.Clusters) -> dict[str, Any]:
        config = self.config
        bands = minhash.choose_bands(config.threshold, config.permutations, config.recall)
        sizes = np.bincount(clusters.label)
        sizes = sizes[sizes > 1]
        return {
            "shingle": self.shingle,
            "bands": bands.count,
            "rows_per_band": bands.rows,
            "chance_to_look_at_a_pair_at_the_threshold": round(bands.chance(config.threshold), 4),
            "standard_error": round(minhash.standard_error(config.threshold, config.permutations), 4),
            "pairs_compared": clusters.compared,
            "pairs_compared_exactly": clusters.exact,
            "candidates_left_out": clusters.left_out,
            "clusters": len(sizes),
            "largest_cluster": int(sizes.max(initial=0)),
        }


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
    """Return the model's folder, downloaded from the Hub if it is there. Raises ``UserError`` where that fails."""
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
        self.config = config
        self.context = context
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
        """Drop a row if an earlier kept row is close to it; the dropped row names that row."""
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


SCALE = 32767
"""Integer that represents 1 in a stored embedding."""
BLOCK = 2048
CHUNK = 8192
"""Rows compared at once, and earlier rows that they are compared with: 64 MiB of products."""
_ERROR = 1e-4
"""Upper bound of the error of a product of two float32 vectors of length 1."""


def quantize(embeddings: np.ndarray) -> np.ndarray:
    """Return (N, D) int16 of embeddings (N, D): scaled to length 1 and rounded. Zero vectors are similar to nothing."""
    vectors = embeddings.astype(np.float64)
    length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    unit = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    rounded: np.ndarray = np.rint(unit * SCALE).astype(np.int16)
    return rounded


@dataclass(frozen=True)
class Similar:
    """Result of a search."""

    label: np.ndarray
    """(N,) int64: the row that stands for each row; the row itself if it stays."""
    compared: int
    """Pairs whose cosine was computed."""


def find_similar(vectors: np.ndarray, threshold: float, device: str = "cpu") -> Similar:
    """Compare rows of :func:`quantize` in order; drop a row if its cosine with a kept row reaches ``threshold``.

    ``vectors`` is (N, D). The earliest such row represents the dropped row.
    """
    import torch

    count = len(vectors)
    label = np.arange(count)
    compared = 0
    with torch.inference_mode():
        for begin in range(0, count, BLOCK):
            block = _Block(vectors, begin, min(begin + BLOCK, count), threshold, device)
            for chunk in range(0, begin, CHUNK):
                # First against all earlier blocks, then within the block: rows are decided in order.
                earlier = np.arange(chunk, min(chunk + CHUNK, begin))
                earlier = earlier[label[earlier] == earlier]  # only rows that stay
                compared += block.compare(label, earlier)
            compared += block.compare_within(label)
    return Similar(label, compared)


class _Block:
    def __init__(self, vectors: np.ndarray, begin: int, end: int, threshold: float, device: str) -> None:
        self.vectors = vectors
        self.threshold = threshold
        self.device = device
        self.rows = np.arange(begin, end)
        self.floats = self._floats(self.rows)

    def compare(self, label: np.ndarray, earlier: np.ndarray) -> int:
        """Drop the block's rows that are similar to an earlier row; return the number of pairs compared."""
        # Rows that an earlier chunk has dropped need no further comparison.
        rows = self.rows[label[self.rows] == self.rows]
        if not len(rows) or not len(earlier):
            return 0
        row_places, column_places = self._similar_pairs(rows, earlier)
        similar_rows, first = np.unique(row_places, return_index=True)
        # Pairs come in order, so the first of a row's matches is the earliest row like it.
        label[rows[similar_rows]] = earlier[column_places[first]]
        return len(rows) * len(earlier)

    def compare_within(self, label: np.ndarray) -> int:
        """Drop rows that are similar to an earlier kept row of the block; return the number of pairs compared."""
        rows = self.rows[label[self.rows] == self.rows]
        row_places, column_places = self._similar_pairs(rows, rows)
        # Each pair once: a row can only be dropped for an earlier row.
        before = column_places < row_places
        # In order, since a row only counts as long as it stays itself.
        for row, earlier in zip(row_places[before].tolist(), column_places[before].tolist(), strict=True):
            if label[rows[row]] == rows[row] and label[rows[earlier]] == rows[earlier]:
                label[rows[row]] = rows[earlier]
        return len(rows) * (len(rows) - 1) // 2

    def _floats(self, rows: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.vectors[rows]).to(self.device).float() / SCALE

    def _similar_pairs(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in ``rows`` and ``columns`` of the pairs whose cosine reaches the threshold, in order."""
        products = self.floats[rows - self.rows[0]] @ self._floats(columns).T
        near = products >= self.threshold - _ERROR  # the only operation on every product
        row_places, column_places = (places.cpu().numpy() for places in near.nonzero(as_tuple=True))
        values = products[near].cpu().numpy()
        similar = values >= self.threshold
        # Integers decide on pairs within the error of the threshold.
        for pair in np.flatnonzero(values < self.threshold + _ERROR):
            first = self.vectors[rows[row_places[pair]]].astype(np.int64)
            second = self.vectors[columns[column_places[pair]]].astype(np.int64)
            similar[pair] = first @ second >= self.threshold * SCALE * SCALE
        return row_places[similar], column_places[similar]
