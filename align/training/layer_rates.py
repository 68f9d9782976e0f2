"""Learning rates that fall from the last layer to the embeddings (discriminative fine-tuning, arXiv 1801.06146)."""

from __future__ import annotations

from typing import Any

import torch

from align.models.parameter_groups import Place, layer_stack, places


def share_of_rate(place: Place, layers: int, decay: float) -> float:
    """The part of the learning rate that a weight at ``place`` learns at: 1 at the last layer and behind it,
    ``decay`` times the layer above below it; the embeddings are one below the first layer."""
    if place == "embeddings":
        return float(decay**layers)
    return float(decay ** (layers - 1 - place)) if isinstance(place, int) else 1.0


def give_layers_their_rates(optimizer: torch.optim.Optimizer, model: Any, decay: float) -> None:
    """Split the optimizer's groups by depth, each with its share of the group's learning rate.

    To be called before a schedule is made from the groups: it multiplies each one's rate at that time.
    """
    _, stack = layer_stack(model)
    where = places(model)
    shares = {id(p): share_of_rate(where[name], len(stack), decay) for name, p in model.named_parameters()}
    for group in list(optimizer.param_groups):
        by_share: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_share.setdefault(shares[id(parameter)], []).append(parameter)
        rate, rest = group["lr"], sorted(by_share, reverse=True)
        for at, share in enumerate(rest):
            if at == 0:
                group["params"], group["lr"] = by_share[share], rate * share
            else:
                optimizer.add_param_group({**group, "params": by_share[share], "lr": rate * share})
