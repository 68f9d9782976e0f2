"""Floating-point operations of passes through a decoder, estimated from its sizes: two per weight and token.

Left out: norms, rotary embeddings and softmax, which are a few percent of a large model and more of a small one.
"""

from __future__ import annotations

from align.config.tuning import TuningBase
from align.models.compute.architecture import Architecture


def forward_flops(model: Architecture, tokens: float, length: float, head: float = 0.0) -> float:
    """Return the operations for ``tokens`` tokens in causal rows of ``length``; ``head`` of them also get logits."""
    queries = next((linear.inputs for linear in model.linears if "o_proj" in linear.path), model.hidden)
    # Scores and their product with the values: 2 x 2 operations per feature and pair of tokens, half of them masked.
    attention = model.layers * 2 * queries * length
    return tokens * (2 * model.matrices + attention) + head * 2 * model.head


def learning_flops(model: Architecture, tuning: TuningBase, tokens: float, length: float, head: float = 0.0) -> float:
    """Return the operations of a forward and a backward pass: three forward passes, or two without weight gradients.

    The backward pass ends at the lowest trained layer.
    """
    if tuning.trains_all:
        return 3 * forward_flops(model, tokens, length, head)
    frozen_layers = forward_flops(model, tokens, length) * (1 - model.learning_layers(tuning) / model.layers)
    return 2 * forward_flops(model, tokens, length, head) - frozen_layers
