"""Run the lower layers of a decoder apart from the upper ones.

When only the last layers are trained, every model that shares the frozen weights below (a policy, its reference, a
critic beside it) has the same hidden states there. The lower layers run once, without gradients, and each model
continues from their states. Left out: decoders that do more before, between or after their layers than Llama does
(``SPLITTABLE``); they run in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SPLITTABLE = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Model types whose trunk is embeddings, ``layers`` and a ``norm``. The tests compare each with the unsplit model."""


def count_frozen_layers(trunk: Any) -> int:
    """Count the lowest layers without a trained weight; 0 for trained embeddings or a model that cannot be split."""
    if getattr(trunk.config, "model_type", "") not in SPLITTABLE or _is_trained(trunk.embed_tokens):
        return 0
    count = 0
    while count < len(trunk.layers) and not _is_trained(trunk.layers[count]):
        count += 1
    return count


def lower_weights_key(trunk: Any) -> tuple[int, ...]:
    """Return a key that is equal for trunks whose embeddings and first layer share memory."""
    first_parameter = next(trunk.layers[0].parameters())
    return trunk.embed_tokens.weight.data_ptr(), first_parameter.data_ptr()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def run_lower_layers(trunk: Any, count: int) -> Iterator[None]:
    """Inside, ``trunk`` ends after its ``count`` lowest layers and skips its final norm."""
    with _replace_layers(trunk, trunk.layers[:count], nn.Identity()):
        yield


@contextmanager
def run_upper_layers(trunk: Any, count: int) -> Iterator[None]:
    """Inside, ``trunk`` takes the states after its ``count`` lowest layers as ``inputs_embeds``."""
    # The layers keep their indices: transformers looks up a layer's mask in config.layer_types by its index.
    layers = nn.ModuleList([_SkippedLayer()] * count)
    layers.extend(trunk.layers[count:])
    with _replace_layers(trunk, layers, trunk.norm):
        yield


class _SkippedLayer(nn.Module):
    """Stand-in for a layer that has run already."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the (B, T, H) states unchanged."""
        return states


@contextmanager
def _replace_layers(trunk: Any, layers: nn.ModuleList, norm: nn.Module) -> Iterator[None]:
    original_layers, original_norm = trunk.layers, trunk.norm
    trunk.layers, trunk.norm = layers, norm
    try:
        yield
    finally:
        trunk.layers, trunk.norm = original_layers, original_norm
