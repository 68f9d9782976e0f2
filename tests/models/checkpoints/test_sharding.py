"""Weights that two models share get copies of their own before models are shared out in parts."""

from __future__ import annotations

import torch
from torch import nn

from align.models.checkpoints.sharding import separate_shared_parameters
from tests.support.refusals import Refused


def two() -> tuple[nn.Module, list[nn.Module]]:
    """Two layers over one weight, and a head and embeddings around them that are tied."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    return nn.ModuleList([embed, first, second, head]), [first, second]


def test_a_frozen_weight_of_two_layers_becomes_two() -> None:
    model, layers = two()
    layers[0].weight.requires_grad_(False)
    separate_shared_parameters(model, layers)
    assert layers[0].weight is not layers[1].weight and torch.equal(layers[0].weight, layers[1].weight)
    assert not layers[1].weight.requires_grad and layers[1].bias.requires_grad
    assert model[0].weight is model[3].weight  # one group


def test_a_trained_one_is_refused(refused: Refused) -> None:
    model, layers = two()
    refused(separate_shared_parameters, model, layers)
