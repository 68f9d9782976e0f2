"""Add special tokens to a model and its tokenizer, as a chat template for a base model needs them.

A new row of the embedding, and of an untied head, starts as the mean of the rows that the model was trained with
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"): its first logits are then near the
average, and no draw decides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add_tokens(tokenizer: Any, model: Any, tokens: Sequence[str]) -> list[int]:
    """Register ``tokens`` as special tokens of ``tokenizer``; return the ids of those that were not in its vocabulary.

    Both change in place. A model with more rows than its tokenizer has tokens gives the new ones spare rows, which are
    set to the mean, too: nothing has trained them.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    trained_rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = [int(index) for index in tokenizer.convert_tokens_to_ids(new)]
    grow_embeddings(model, len(tokenizer))
    if ids:
        _set_to_mean(model, ids, trained_rows)
    return ids


def grow_embeddings(model: Any, rows: int) -> None:
    """Give embedding and head ``rows`` rows, where they have fewer; the new ones are the mean of the others."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    # mean_resizing would draw the rows from a distribution around the mean.
    model.resize_token_embeddings(rows, mean_resizing=False)
    _set_to_mean(model, range(before, rows), before)


def _set_to_mean(model: Any, ids: Sequence[int], trained_rows: int) -> None:
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    with torch.no_grad():
        for table in tables:  # (V, hidden)
            table[list(ids)] = table[:trained_rows].float().mean(dim=0).to(table.dtype)
        bias = getattr(head, "bias", None)
        if bias is not None:
            bias[list(ids)] = bias[:trained_rows].float().mean().to(bias.dtype)
