"""Embeddings of texts, from static vectors (model2vec) or from the mean hidden state of any transformers model.

Called by the data step ``semantic_duplicates``. Both read local folders and run no code that comes with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.errors import UserError

Embedder = Callable[[list[str]], np.ndarray]
"""Takes texts, returns (texts, dimensions) float32."""


def make_embedder(folder: Path, device: str, max_length: int, batch_size: int) -> Embedder:
    """The embedder in a folder: static where its config.json names no transformers model, else a transformers model.

    Raises ``UserError`` for a folder that holds neither, and where model2vec is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; name the folder of a model2vec or transformers model.") from None
    except ValueError as error:
        raise UserError(f"{folder}/config.json: not valid JSON: {error}. Fetch the model again.") from None
    if config.get("model_type", "model2vec") == "model2vec":
        return _static(folder, max_length)
    return _Transformer(folder, device, max_length, batch_size)


def _static(folder: Path, max_length: int) -> Embedder:
    try:
        from model2vec import StaticModel
    except ImportError:
        raise UserError(
            f"{folder} holds static embeddings, which model2vec reads: pip install 'align[data]'. A transformers model "
            "needs nothing more."
        ) from None
    try:
        model = StaticModel.from_pretrained(folder, force_download=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a readable model2vec model: {error}.") from error

    def embed(texts: list[str]) -> np.ndarray:
        found: np.ndarray = model.encode(texts, max_length=max_length, use_multiprocessing=False)
        return found.astype(np.float32)

    return embed


class _Transformer:
    def __init__(self, folder: Path, device: str, max_length: int, batch_size: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.max_length, self.batch_size = max_length, batch_size
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            state = torch.get_rng_state()  # transformers draws what a checkpoint lacks from the caller's randomness
            self.model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            torch.set_rng_state(state)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a readable transformers model: {str(error).splitlines()[0]}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        found = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), number))  # little padding
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            encoded = self.tokenizer(
                [texts[number] for number in batch],
                padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            if encoded["input_ids"].shape[1] == 0:
                continue  # nothing but empty texts
            mask = encoded["attention_mask"]
            hidden = self.model(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            found[batch] = ((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)).float().cpu().numpy()
        return found
