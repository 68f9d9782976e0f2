"""Bottleneck adapters: narrow modules beside or behind the parts of each frozen layer.

Parallel (arXiv 2110.04366): a narrow gated MLP beside the layer's own, with the same activation. Their sum is one gated
MLP that is wider by the bottleneck's size, so saving gives a plain checkpoint with a larger ``intermediate_size``.
Sequential (arXiv 1902.00751, 2005.00052): ``y + W_up gelu(W_down y)`` on the output y of attention or MLP, before the
residual sum; no checkpoint of an ordinary architecture holds that, so it is stored beside one. All start as nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from align.config.tuning import AdaptersTuning
from align.models.tuning.inserted import Insertion, train_insertions_only
from align.models.tuning.layers import GATED, decoder_layers, gated_mlps

NAME = "bottleneck"


class Parallel(Insertion):
    """``W_down (act(W_gate x) * W_up x)``; matrices of its own as plain parameters, which no other method adapts."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(size, hidden)) for _ in range(2))
        self.down = nn.Parameter(torch.zeros(hidden, size))
        for matrix in (self.gate, self.up):
            nn.init.normal_(matrix, std=hidden**-0.5)

    def forward(self, inputs: torch.Tensor, activation: Any) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        return F.linear(activation(F.linear(inputs, self.gate)) * F.linear(inputs, self.up), self.down)


class Sequential(Insertion):
    """``y + W_up gelu(W_down y + b) + c``."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, hidden))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(hidden, size))
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        nn.init.normal_(self.down, std=hidden**-0.5)

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        inner = F.gelu(F.linear(outputs, self.down, self.down_bias))
        return outputs + F.linear(inner, self.up, self.up_bias)


def wrap(model: Any, tuning: AdaptersTuning, seed: int) -> Any:
    """``model`` with bottlenecks drawn from ``seed``, all that is trained. ``UserError`` where they have no place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        insert(model, tuning)
    return train_insertions_only(model)


def insert(model: Any, tuning: AdaptersTuning) -> None:
    """Put the modules into every layer, with first values from torch's global generator."""
    hidden, method = model.config.get_text_config().hidden_size, "adapters"
    if tuning.position == "parallel":
        for mlp in gated_mlps(model, method):
            _put(mlp, Parallel(hidden, tuning.size), _beside)
        return
    for layer in decoder_layers(model, method):
        for part in tuning.after:
            _put(layer.self_attn if part == "attention" else layer.mlp, Sequential(hidden, tuning.size), _behind)


def _put(module: Any, bottleneck: Insertion, hook: Any) -> None:
    weight = next(module.parameters())
    module.add_module(NAME, bottleneck.to(weight.device, weight.dtype if weight.is_floating_point() else None))
    module.register_forward_hook(hook)


def _beside(mlp: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
    return outputs + mlp.bottleneck(inputs[0], mlp.act_fn) if mlp.bottleneck.enabled else outputs


def _behind(module: Any, inputs: Any, outputs: Any) -> Any:
    if not module.bottleneck.enabled:
        return outputs
    if isinstance(outputs, tuple):  # attention gives its weights too
        return module.bottleneck(outputs[0]), *outputs[1:]
    return module.bottleneck(outputs)


def is_parallel(model: Any) -> bool:
    """Whether ``model`` has bottlenecks that its MLPs can take in."""
    return any(isinstance(module, Parallel) for module in model.modules())


def folded_width(model: Any) -> int:
    """Features of each MLP once its parallel bottleneck is part of it."""
    size = next(module.gate.shape[0] for module in model.modules() if isinstance(module, Parallel))
    return int(model.config.get_text_config().intermediate_size) + size


def folded(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` of ``model`` with each parallel bottleneck in its MLP.

    ``sum_i down_i act(gate_i x) up_i x`` runs over the features of both, so gate and up get more rows and down more
    columns; the bottleneck's gate and up have no bias, and its rows of one are zero.
    """
    found = dict(weights)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Parallel):
            continue
        mlp, _, _ = name.rpartition(".")
        gate, up, down = (f"{mlp}.{matrix}.weight" for matrix in GATED)
        for matrix, own, dim in ((gate, module.gate, 0), (up, module.up, 0), (down, module.down, 1)):
            found[matrix] = torch.cat([found[matrix], own.detach().to(found[matrix].dtype)], dim=dim)
            bias = matrix.removesuffix("weight") + "bias"
            if dim == 0 and bias in found:
                found[bias] = torch.cat([found[bias], found[bias].new_zeros(len(own))])
        for key in module.state_dict():
            found.pop(f"{name}.{key}", None)
    return found
