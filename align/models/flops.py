"""Floating-point operations of passes through a decoder, from its sizes: a product of matrices counts two per weight.

Left out: norms, rotations, softmax, which are a few per cent of a large model and more of a small one.
"""

from __future__ import annotations

from align.config.tuning import TuningBase
from align.models.architecture import Architecture


def forward_flops(model: Architecture, tokens: float, length: float, head: float = 0.0) -> float:
    """Of ``tokens`` tokens in causal rows of ``length``; ``head`` of them go through the vocabulary as well."""
    queries = next((linear.inputs for linear in model.linears if "o_proj" in linear.path), model.hidden)
    # scores and their product with the values: 2 x 2 operations a feature and pair, half the pairs being masked
    attention = model.layers * 2 * queries * length
    return tokens * (2 * model.matrices + attention) + head * 2 * model.head


def learning_flops(model: Architecture, tuning: TuningBase, tokens: float, length: float, head: float = 0.0) -> float:
    """Of forward and backward pass: three forward passes' worth, or two where no frozen matrix needs a gradient.

    No backward pass goes through layers below the first one that is trained.
    """
    if tuning.trains_all:
        return 3 * forward_flops(model, tokens, length, head)
    below = forward_flops(model, tokens, length) * (1 - model.learning_layers(tuning) / model.layers)
    return 2 * forward_flops(model, tokens, length, head) - below
