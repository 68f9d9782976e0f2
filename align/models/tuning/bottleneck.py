"""Bottleneck adapters: narrow modules parallel to or after the parts of each frozen layer.

Parallel (arXiv 2110.04366): a narrow gated MLP beside the layer's own, with the same activation. Their sum is one gated
MLP that is wider by the bottleneck's size, so it is saved as a plain checkpoint with a larger ``intermediate_size``.
Sequential (arXiv 1902.00751, 2005.00052): ``y + W_up gelu(W_down y)`` on the output y of attention or MLP, before the
residual sum. No plain checkpoint can hold that, so it is stored beside one. Both start as the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from align.config.tuning import AdaptersTuning
from align.models.tuning.inserted import Insertion
from align.models.tuning.layers import GATED, decoder_layers, gated_mlps

NAME = "bottleneck"


class Parallel(Insertion):
    """``W_down (act(W_gate x) * W_up x)``. Its matrices are bare parameters, which no other method adapts."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(size, hidden)) for _ in range(2))
        self.down = nn.Parameter(torch.zeros(hidden, size))
        for matrix in (self.gate, self.up):
            nn.init.normal_(matrix, std=hidden**-0.5)

    def forward(self, inputs: torch.Tensor, activation: Any) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
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
        """(B, T, H) -> (B, T, H)."""
        inner = F.gelu(F.linear(outputs, self.down, self.down_bias))
        return outputs + F.linear(inner, self.up, self.up_bias)


def insert(model: Any, tuning: AdaptersTuning) -> None:
    """Insert the modules into every layer, initialized from torch's global generator."""
    hidden, method = model.config.get_text_config().hidden_size, "adapters"
    if tuning.position == "parallel":
        for mlp in gated_mlps(model, method):
            _insert_module(mlp, Parallel(hidden, tuning.size), _add_parallel)
        return
    for layer in decoder_layers(model, method):
        for part in tuning.after:
            _insert_module(
                layer.self_attn if part == "attention" else layer.mlp,
                Sequential(hidden, tuning.size),
                _apply_sequential,
            )


def _insert_module(module: Any, bottleneck: Insertion, hook: Any) -> None:
    weight = next(module.parameters())
    module.add_module(NAME, bottleneck.to(weight.device, weight.dtype if weight.is_floating_point() else None))
    module.register_forward_hook(hook)


def _add_parallel(mlp: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
    return outputs + mlp.bottleneck(inputs[0], mlp.act_fn) if mlp.bottleneck.enabled else outputs


def _apply_sequential(module: Any, inputs: Any, outputs: Any) -> Any:
    if not module.bottleneck.enabled:
        return outputs
    if isinstance(outputs, tuple):  # attention returns its weights too
        return module.bottleneck(outputs[0]), *outputs[1:]
    return module.bottleneck(outputs)


def is_parallel(model: Any) -> bool:
    """Return True for a model with bottlenecks that can be merged into its MLPs."""
    return any(isinstance(module, Parallel) for module in model.modules())


def merged_width(model: Any) -> int:
    """Return the width of each MLP with its parallel bottleneck merged."""
    size = next(module.gate.shape[0] for module in model.modules() if isinstance(module, Parallel))
    return int(model.config.get_text_config().intermediate_size) + size


def merge_into_mlps(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``weights`` of ``model`` with each parallel bottleneck merged into its MLP.

    ``sum_i down_i act(gate_i x) up_i x`` runs over the features of both: gate and up, shape (inner, hidden), get more
    rows, down (hidden, inner) more columns. The bottleneck has no biases, so those of its rows are zero.
    """
    merged = dict(weights)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Parallel):
            continue
        mlp, _, _ = name.rpartition(".")
        gate, up, down = (f"{mlp}.{matrix}.weight" for matrix in GATED)
        # Gate and up get the bottleneck's rows at the end, down its columns.
        for matrix, addition, dim in ((gate, module.gate, 0), (up, module.up, 0), (down, module.down, 1)):
            merged[matrix] = torch.cat([merged[matrix], addition.detach().to(merged[matrix].dtype)], dim=dim)
            bias = matrix.removesuffix("weight") + "bias"
            if dim == 0 and bias in merged:
                merged[bias] = torch.cat([merged[bias], merged[bias].new_zeros(len(addition))])
        for key in module.state_dict():
            merged.pop(f"{name}.{key}", None)
    return merged
