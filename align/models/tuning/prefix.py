"""Prefix tuning: keys and values of virtual tokens, learned in every layer (arXiv 2101.00190).

The virtual tokens stand in every row (``virtual_tokens``); at their places the outputs of each layer's key and value
matrices are the learned ones, whatever the layer below gave. So caches, padding and ragged rows go on working, and the
real tokens see what they see with peft's prefix: there keys come without rotation, here they are rotated by their
places, which is one and the same up to what is learned. Left out: the network that Li and Liang train instead; keys and
values of real tokens to start from do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from align.config.tuning import PrefixTuning
from align.models.tuning.inserted import Insertion, train_insertions_only
from align.models.tuning.layers import attentions
from align.models.tuning.virtual_tokens import NAME as TOKENS
from align.models.tuning.virtual_tokens import Tokens, first_ids, make_room, new_tokens, put

NAME = "prefix"
MATRICES = ("k_proj", "v_proj")


class Rows(Insertion):
    """At one key or value matrix: what comes out of it at the virtual tokens, (tokens, width)."""

    def __init__(self, tokens: Tokens, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone().float())
        self.where = [tokens]  # in a list, so that it is no submodule

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, T, width) with the learned rows in their places."""
        places = self.where[0].places
        rows = self.rows[places.clamp(min=0)].to(outputs.dtype)
        return torch.where((places >= 0)[..., None], rows, outputs)


def wrap(model: Any, tuning: PrefixTuning, seed: int, tokenizer: Any) -> Any:
    """``model`` with a prefix that starts as the keys and values of real tokens, all that is trained."""
    ids = new_tokens(tokenizer, tuning)
    if not hasattr(model.get_input_embeddings(), TOKENS):
        make_room(model, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = first_ids(tokenizer, tuning.text, len(ids))
    insert(model, ids[0], _keys_and_values(model, start))
    return train_insertions_only(model)


def insert(model: Any, first: int, rows: list[dict[str, torch.Tensor]]) -> None:
    """Put ``rows[layer][matrix]`` into the attention of every layer; ``first`` is the first virtual token's id."""
    tokens = Tokens(first, len(rows[0][MATRICES[0]]))
    put(model, tokens)
    for attention, own in zip(attentions(model, "prefix"), rows, strict=True):
        for name in MATRICES:
            matrix = getattr(attention, name)
            matrix.add_module(NAME, Rows(tokens, own[name]).to(matrix.weight.device))
            matrix.register_forward_hook(_replace)


def widths(model: Any) -> list[dict[str, int]]:
    """Features of each layer's keys and values."""
    return [{name: getattr(one, name).out_features for name in MATRICES} for one in attentions(model, "prefix")]


def _replace(matrix: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
    replaced: torch.Tensor = matrix.prefix(outputs) if matrix.prefix.enabled else outputs
    return replaced


@torch.no_grad()
def _keys_and_values(model: Any, ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """What the key and value matrices give for a prompt of these tokens, (tokens, width) each."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in attentions(model, "prefix")]
    hooks = []
    for own, attention in zip(found, attentions(model, "prefix"), strict=True):
        for name in MATRICES:

            def keep(_: Any, __: Any, outputs: torch.Tensor, own: Any = own, name: str = name) -> None:
                own[name] = outputs[0].float()

            hooks.append(getattr(attention, name).register_forward_hook(keep))
    try:
        device = model.get_input_embeddings().weight.device
        getattr(model, model.base_model_prefix)(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
