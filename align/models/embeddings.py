"""Embed texts by static vectors (model2vec) or by the mean hidden state of a transformers model.

The data step ``semantic_duplicates`` uses it. Both read local folders and run no code that comes with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.errors import UserError
from align.models.files import CONFIG, read_object
from align.models.pretrained import open_model, open_static, open_tokenizer

Embedder = Callable[[list[str]], np.ndarray]
"""Maps N texts to an (N, D) float32 array."""


def make_embedder(folder: Path, device: str, max_length: int, batch_size: int) -> Embedder:
    """Return the embedder in a folder: static where its config.json names no transformers model.

    Raises ``UserError`` for a folder that holds neither, and where model2vec is missing.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}; name the folder of a model2vec or transformers model.")
    config = read_object(folder / CONFIG)
    if config.get("model_type", "model2vec") == "model2vec":
        return _static(folder, max_length)
    return _Transformer(folder, device, max_length, batch_size)


def _static(folder: Path, max_length: int) -> Embedder:
    try:
        model = open_static(folder)
    except ImportError:
        raise UserError(
            f"{folder} holds static embeddings, which model2vec reads: pip install 'align-pipeline[data]'. "
            "A transformers model needs nothing more."
        ) from None

    def embed(texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = model.encode(texts, max_length=max_length, use_multiprocessing=False)
        return vectors.astype(np.float32)

    return embed


class _Transformer:
    def __init__(self, folder: Path, device: str, max_length: int, batch_size: int) -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.max_length, self.batch_size = max_length, batch_size
        self.tokenizer = open_tokenizer(folder)
        self.model: Any = open_model("encoder", folder, torch.float32)[0]
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), number))  # little padding
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            encoded = self.tokenizer(
                [texts[number] for number in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            if encoded["input_ids"].shape[1] == 0:
                continue  # only empty texts
            mask = encoded["attention_mask"]
            hidden = self.model(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state
            # Mean of the hidden states over real tokens.
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            vectors[batch] = ((hidden * weights).sum(1) / weights.sum(1).clamp(min=1)).float().cpu().numpy()
        return vectors
