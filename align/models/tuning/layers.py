"""Find the attention and MLP modules of a decoder's layers, and the layers that peft has adapted.

Modules are found by the names that most decoders of transformers use. Excluded: decoders that fuse these matrices or
use other names (GPT-2, GPT-NeoX, Phi-3), which are refused.

Train the rows of a few tokens next to low-rank adapters (``tuning.train_tokens``), by peft's trainable tokens.

The rows of the embedding, and of an untied head, are their own parameters; all other rows stay frozen. A base model
learns the tokens of its new chat template that way, at the cost of a few thousand parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.config.tuning import LowRank, TuningBase
from align.config.validation import nearest
from align.errors import UserError
from align.models.checkpoints.folder_checks import TOKENIZER, token_ids

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: Any, method: str) -> list[Any]:
    """Return the layers from first to last. Raises ``UserError`` if they have no ``self_attn`` and ``mlp``."""
    # The trunk itself may be passed as well.
    trunk = getattr(model, model.base_model_prefix, model)
    layers = list(getattr(trunk, "layers", []))
    if not layers or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise _unsupported(model, method, "layers of self_attn and mlp")
    return layers


def attentions(model: Any, method: str) -> list[Any]:
    """Return each layer's attention, with a matrix each for queries, keys, values and output."""
    modules = [layer.self_attn for layer in decoder_layers(model, method)]
    if not all(_has(module, ATTENTION) for module in modules):
        raise _unsupported(model, method, f"attention made of {', '.join(ATTENTION)}")
    return modules


def gated_mlps(model: Any, method: str) -> list[Any]:
    """Return each layer's MLP, made of ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``."""
    modules = [layer.mlp for layer in decoder_layers(model, method)]
    if not all(_has(module, GATED) and hasattr(module, "act_fn") for module in modules):
        raise _unsupported(model, method, f"a gated MLP of {', '.join(GATED)}")
    return modules


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _unsupported(model: Any, method: str, expected: str) -> UserError:
    return UserError(
        f"tuning.method: {method} needs {expected}, which this {model.config.model_type} has not. Take lora, or a "
        "model of the llama, mistral, qwen2, qwen3 or smollm3 kind."
    )


PEFT_PREFIX = "base_model.model."


def tuner_layers(model: Any) -> dict[str, Any]:
    """Return the layers that peft wraps around the model's own, by the plain name of the wrapped module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


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
