"""Prefix tuning: keys and values of virtual tokens, learned in every layer (arXiv 2101.00190).

Every row begins with virtual tokens (``virtual_tokens``). At their positions each layer's key and value matrices return
learned rows, whatever the layer below computed. Caches, padding and ragged rows therefore work unchanged, and the real
tokens see what they see with peft's prefix; peft does not rotate these keys, here they are rotated by their positions,
which training absorbs. Left out: the network that Li and Liang train instead; starting from the keys and values of real
tokens makes it unnecessary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from align.config.tuning import PrefixTuning
from align.models.tuning.inserted import Insertion, train_insertions_only
from align.models.tuning.layers import attentions
from align.models.tuning.virtual_tokens import NAME as TOKENS
from align.models.tuning.virtual_tokens import Tokens, add_embedding_rows, first_ids, insert_tokens, new_tokens

NAME = "prefix"
MATRICES = ("k_proj", "v_proj")


class Rows(Insertion):
    """The learned output of one key or value matrix at the virtual tokens, (tokens, width)."""

    def __init__(self, tokens: Tokens, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone().float())
        self.tokens = [tokens]  # in a list, so that it does not become a submodule

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> (B, T, width) with the learned rows at the virtual tokens."""
        places = self.tokens[0].places  # (B, T)
        rows = self.rows[places.clamp(min=0)].to(outputs.dtype)
        return torch.where((places >= 0)[..., None], rows, outputs)


def wrap(model: Any, tuning: PrefixTuning, seed: int, tokenizer: Any) -> Any:
    """Return ``model`` with a trained prefix that starts as the keys and values of real tokens."""
    ids = new_tokens(tokenizer, tuning)
    if not hasattr(model.get_input_embeddings(), TOKENS):
        add_embedding_rows(model, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = first_ids(tokenizer, tuning.text, len(ids))
    # Start from the keys and values that the frozen model computes for real tokens.
    insert(model, ids[0], _keys_and_values(model, start))
    return train_insertions_only(model)


def insert(model: Any, first: int, rows: list[dict[str, torch.Tensor]]) -> None:
    """Insert ``rows[layer][matrix]``, shape (tokens, width), into every layer; ``first`` is the first token's id."""
    tokens = Tokens(first, len(rows[0][MATRICES[0]]))
    insert_tokens(model, tokens)
    for attention, layer_rows in zip(attentions(model, "prefix"), rows, strict=True):
        for name in MATRICES:
            matrix = getattr(attention, name)
            matrix.add_module(NAME, Rows(tokens, layer_rows[name]).to(matrix.weight.device))
            matrix.register_forward_hook(_replace)


def widths(model: Any) -> list[dict[str, int]]:
    """Return the features of each layer's keys and values."""
    modules = attentions(model, "prefix")
    return [{name: getattr(attention, name).out_features for name in MATRICES} for attention in modules]


def _replace(matrix: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
    replaced: torch.Tensor = matrix.prefix(outputs) if matrix.prefix.enabled else outputs
    return replaced


@torch.no_grad()
def _keys_and_values(model: Any, ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """Return the outputs of the key and value matrices for a prompt of these tokens, (tokens, width) each."""
    rows: list[dict[str, torch.Tensor]] = [{} for _ in attentions(model, "prefix")]
    hooks = []
    for layer_rows, attention in zip(rows, attentions(model, "prefix"), strict=True):
        for name in MATRICES:

            def _store(_: Any, __: Any, outputs: torch.Tensor, layer_rows: Any = layer_rows, name: str = name) -> None:
                layer_rows[name] = outputs[0].float()

            hooks.append(getattr(attention, name).register_forward_hook(_store))
    try:
        device = model.get_input_embeddings().weight.device
        getattr(model, model.base_model_prefix)(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return rows
