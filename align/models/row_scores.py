"""Score rows of data by a model (reward, perplexity, or instruction-following difficulty), and embed texts.

The data steps ``score`` and ``semantic_duplicates`` use it. Both read local folders and run no code that comes with the
weights. Excluded: filtering rows by their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from align.data.rows import Row, answer_side, is_finished
from align.errors import UserError
from align.models.chat.render import split_turns
from align.models.checkpoints.files import CONFIG, read_object
from align.models.compute.precision import autocast, resolve_precision
from align.models.fast.token_logprobs import logit_transform
from align.models.loading import load_policy, load_tokenizer
from align.models.pretrained import open_model, open_static, open_tokenizer
from align.models.reward import RewardModel

Scorer = Callable[[list[Row]], list[float]]


def make_scorer(config: Any, folder: Path, device: str) -> Scorer:
    """Return the scorer of a ``ScoreConfig``, with the model in ``folder``."""
    device = _device(device)
    if config.by == "reward":
        return _RewardScorer(folder, device, config)
    return _PerplexityScorer(folder, device, config, alone=config.by == "ifd")


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def reply_text(row: Row) -> str | None:
    """Return the text to score: the completion, or the chosen reply; None for a row without either."""
    answer = row.get(answer_side(row))
    return str(answer[-1]["content"]) if answer else None


class _RewardScorer:
    def __init__(self, folder: Path, device: str, config: Any) -> None:
        self.model = RewardModel(folder, device=device, precision=config.precision, batch_size=config.batch_size)

    def __call__(self, rows: list[Row]) -> list[float]:
        with_reply = [row for row in rows if reply_text(row) is not None]
        are_finished = [is_finished(row, answer_side(row)) for row in with_reply]
        prompts = [[*row["prompt"], *row[answer_side(row)][:-1]] for row in with_reply]
        texts = [reply_text(row) or "" for row in with_reply]
        scores = iter(self.model.score(prompts, texts, are_finished, [row.get("tools") for row in with_reply]))
        return [next(scores) if reply_text(row) is not None else math.nan for row in rows]


class _PerplexityScorer:
    """Perplexity of an answer's last turn given all before it; with ``alone``, divided by the turn's own (IFD).

    Raises ``PromptRewritten`` for a template that renders the text before the turn differently once it follows.
    """

    def __init__(self, folder: Path, device: str, config: Any, alone: bool) -> None:
        self.tokenizer = load_tokenizer(folder)
        model = load_policy(folder).to(device).eval()
        self._trunk = getattr(model, model.base_model_prefix)
        self._head = model.get_output_embeddings()
        self._transform = logit_transform(model)
        self.device = device
        self.precision = resolve_precision(config.precision, torch.device(device))
        self.batch_size = config.batch_size
        self.max_length = config.max_length
        self.alone = alone

    def __call__(self, rows: list[Row]) -> list[float]:
        # Every row gives up to two texts: the reply after its prompt, and for IFD the reply only.
        texts: list[tuple[list[int], int]] = []  # ids, and how many of them are context only
        indices: list[list[int]] = []
        for row in rows:
            row_texts = self._texts(row)
            indices.append(list(range(len(texts), len(texts) + len(row_texts))))
            texts += row_texts
        losses = self._losses(texts)
        scores = []
        for own_indices in indices:
            values = [losses[index] for index in own_indices]
            if not values:
                scores.append(math.nan)
            else:  # a difference of logarithms: a ratio of exponentials can overflow
                scores.append(math.exp(min(values[0] - (values[1] if self.alone else 0.0), 700.0)))
        return scores

    def _texts(self, row: Row) -> list[tuple[list[int], int]]:
        text = reply_text(row)
        if not text:
            return []
        side = answer_side(row)
        last = len(row["prompt"]) + len(row[side]) - 1
        ((prompt, answer),) = split_turns(self.tokenizer, row, side, [last])
        if len(prompt) + 1 >= self.max_length or not answer:
            return []
        conditioned = ([*prompt, *answer][: self.max_length], len(prompt))
        if not self.alone:
            return [conditioned]
        # The reply only follows the token that opens a text, so its own first token is scored as well.
        start = self.tokenizer.bos_token_id
        begin = prompt[:1] if start is None else [start]
        # Both texts score the same answer tokens, so this one is cut where the other was.
        return [conditioned, ([*begin, *answer[: len(conditioned[0]) - len(prompt)]], 1)]

    def _losses(self, texts: list[tuple[list[int], int]]) -> list[float]:
        """Return the mean negative log-likelihood of each text's scored tokens, in nats."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index][0]))
        means = [math.nan] * len(texts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, loss in zip(batch, self._batch([texts[index] for index in batch]), strict=True):
                means[index] = loss
        return means

    @torch.no_grad()
    def _batch(self, texts: list[tuple[list[int], int]]) -> list[float]:
        width = max(len(ids) for ids, _ in texts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row, _ in texts], device=self.device)  # (B, T)
        scored = torch.tensor(
            [[skip <= position < len(row) for position in range(1, width)] for row, skip in texts]
        )  # (B, T-1)
        scored = scored.to(self.device)
        with autocast(self.device, self.precision):
            # Rows are right-padded and attention is causal, so padding needs no mask.
            hidden = self._trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
            product = self._head(hidden[scored])  # only of tokens that count: (N, V)
        logits = self._transform.apply(product.float())
        # Sum the losses per row: nonzero()[:, 0] is the row of each scored token.
        losses = F.cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        sums = losses.new_zeros(len(texts)).index_add_(0, scored.nonzero()[:, 0], losses)
        means: list[float] = (sums / scored.sum(dim=1)).tolist()
        return means


Embedder = Callable[[list[str]], np.ndarray]
"""Maps N texts to an (N, D) float32 array."""


def make_embedder(folder: Path, device: str, max_length: int, batch_size: int) -> Embedder:
    """Return the embedder in a folder: static if its config.json names no transformers model.

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
            f"{folder} holds static embeddings, which model2vec reads: pip install 'align-pipeline[data]'."
        ) from None

    def embed(texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = model.encode(texts, max_length=max_length, use_multiprocessing=False)
        return vectors.astype(np.float32)

    return embed


class _Transformer:
    def __init__(self, folder: Path, device: str, max_length: int, batch_size: int) -> None:
        self.device = _device(device)
        self.max_length = max_length
        self.batch_size = batch_size
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
