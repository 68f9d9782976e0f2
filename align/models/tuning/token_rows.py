"""Train the rows of a few tokens beside low-rank adapters (``tuning.train_tokens``), by peft's trainable tokens.

The rows of the embedding, and of an untied head, are parameters of their own; all other rows stay frozen. A base model
learns the tokens of its new chat template that way, at the cost of a few thousand parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.tuning import LowRank, TuningBase
from align.config.validation import nearest
from align.errors import UserError
from align.models.tokenizer_checks import TOKENIZER, token_ids

IDS = "align_token_ids"
"""Attribute of a model: the ids of the tokens to train."""
ADAPTER = ".token_adapter"
"""Last part of the name of peft's layer inside the module that it wraps."""


def note_ids(model: Any, source: Path, tuning: TuningBase) -> None:
    """Look the tokens of ``tuning`` up in the vocabulary of the checkpoint ``source``, for :func:`rows_by_module`.

    Raises ``UserError`` for a token that is not there.
    """
    if not isinstance(tuning, LowRank) or not tuning.train_tokens:
        return
    known = token_ids(source / TOKENIZER)
    for token in tuning.train_tokens:
        if token not in known:
            close = nearest(token, [name for name in known if name.startswith(token[:1])])
            hint = f" Did you mean '{close}'?" if close else ""
            raise UserError(
                f"tuning.train_tokens: the vocabulary of {source} has no token {token!r}.{hint} `add_tokens` of a "
                "model stage adds one."
            )
    setattr(model, IDS, [known[token] for token in tuning.train_tokens])


def rows_by_module(model: Any, tokens: Sequence[str]) -> dict[str, list[int]] | None:
    """Return, for peft, the rows to train by the names of embedding and untied head; None without tokens."""
    if not tokens:
        return None
    ids = getattr(model, IDS, None)
    if ids is None:
        raise UserError("tuning.train_tokens: this model was not loaded from a checkpoint with a tokenizer.json.")
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {names[id(embedding)]: list(ids)}
    # peft trains the rows of a tied head together with the embedding's.
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)]] = list(ids)
    return rows


def require_plain(model: Any) -> None:
    """Raise ``UserError`` for a head with a bias, which peft's layer would leave out."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "tuning.train_tokens: this model's head has a bias, which peft's trained rows leave out. Take "
            "`save_modules` with the names of embedding and head instead."
        )


def prepare(peft_model: Any) -> None:
    """Give wrapped heads the attribute ``bias``, which trl's fused loss and align's losses read and peft hides."""
    from peft.utils.other import TrainableTokensWrapper

    for module in peft_model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # type: ignore[assignment]


def is_trained_rows(layer: Any) -> bool:
    """Return True for peft's layer of trained rows."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return isinstance(layer, TrainableTokensLayer)


def merged_rows(layer: Any) -> torch.Tensor:
    """Return the matrix (V, hidden) of a layer of trained rows with their values in it, in float32."""
    merged: torch.Tensor = layer.get_base_layer().weight.detach().float().clone()
    for adapter in layer.active_adapters:
        rows = layer.trainable_tokens_delta[adapter]
        merged[torch.tensor(layer.token_indices[adapter], device=merged.device)] = rows.detach().float()
    return merged
