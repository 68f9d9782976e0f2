"""Checks on the embeddings of the template's control tokens: a token that was added and never trained says nothing."""

from __future__ import annotations

from typing import Any

import torch

from align.lint.dialect import Dialect
from align.lint.findings import Findings

NEAR_MEAN = 0.02
"""A row this near to the mean of all rows, as a share of the usual distance, was put there when the embeddings were
resized. transformers draws new rows from a normal distribution of 1e-9 times the others' covariance."""
SAMPLE = 2048
"""Rows from which mean and usual distance are estimated."""


def check_embeddings(model: Any, dialect: Dialect, found: Findings) -> None:
    """Look for control tokens of the template whose embedding is zero, the mean of all, or equal to another's."""
    weight = model.get_input_embeddings().weight.detach()
    virtual = set(getattr(dialect.tokenizer, "new_virtual_tokens", []))  # this stage trains vectors in their place
    ids = {name: dialect.special[name] for name in sorted(dialect.written)}
    ids = {name: index for name, index in ids.items() if index < len(weight) and index not in virtual}
    if not ids or weight.is_meta or weight.dim() != 2:
        return
    step = max(1, len(weight) // SAMPLE)
    sample = weight[::step].float()
    mean = sample.mean(dim=0)
    usual = float((sample - mean).norm(dim=1).median())
    rows = {name: weight[index].float() for name, index in ids.items()}
    for name, row in rows.items():
        twins = [other for other, values in rows.items() if other != name and torch.equal(values, row)]
        if not bool(row.any()):
            found.add("untrained-token", None, f"{name!r} is embedded as zeros")
        elif float((row - mean).norm()) < NEAR_MEAN * usual:
            found.add("untrained-token", None, f"{name!r} is embedded as the mean of all tokens")
        elif twins:
            found.add("untrained-token", None, f"{name!r} has the embedding of {twins[0]!r}")
