"""The lower layers of a decoder, passed apart from the rest of it.

Where the last layers alone are trained, whatever shares the frozen weights below has the same states there: a policy,
its reference, a critic beside it. They are passed once, without gradients, and each goes on from them. Left out:
decoders that do more before, between or behind their layers than Llama does (``SPLIT``); they are passed whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SPLIT = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Types of models whose trunk is embeddings, ``layers``, and a ``norm``; the tests hold each against the whole."""


def frozen_below(trunk: Any) -> int:
    """How many of the lowest layers have no trained weight, nor the embeddings below; 0 for another kind of model."""
    if getattr(trunk.config, "model_type", "") not in SPLIT or _is_trained(trunk.embed_tokens):
        return 0
    count = 0
    while count < len(trunk.layers) and not _is_trained(trunk.layers[count]):
        count += 1
    return count


def same_below(trunk: Any) -> tuple[int, ...]:
    """Equal for trunks that share their lowest weights."""
    first = next(trunk.layers[0].parameters())
    return trunk.embed_tokens.weight.data_ptr(), first.data_ptr()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def below(trunk: Any, count: int) -> Iterator[None]:
    """Have ``trunk`` end behind its ``count`` lowest layers, before its norm."""
    with _replaced(trunk, trunk.layers[:count], nn.Identity()):
        yield


@contextmanager
def above(trunk: Any, count: int) -> Iterator[None]:
    """Have ``trunk`` start from states behind its ``count`` lowest layers, as ``inputs_embeds``.

    The layers keep their numbers, since transformers looks up a layer's mask in ``config.layer_types`` by its number.
    """
    layers = nn.ModuleList([_Passed()] * count)
    layers.extend(trunk.layers[count:])
    with _replaced(trunk, layers, trunk.norm):
        yield


class _Passed(nn.Module):
    """In the place of a layer whose work is done."""

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return states


@contextmanager
def _replaced(trunk: Any, layers: nn.ModuleList, norm: nn.Module) -> Iterator[None]:
    whole = trunk.layers, trunk.norm
    trunk.layers, trunk.norm = layers, norm
    try:
        yield
    finally:
        trunk.layers, trunk.norm = whole
