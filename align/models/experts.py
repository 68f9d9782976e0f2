"""Find the parts of a mixture of experts: its blocks, their routers and expert matrices, and the routers' loss.

transformers stores the experts of a block as parameters of three dimensions, (experts, in, out) or (experts, out, in),
of a module called ``experts``. The router that chooses among them is another child of the same block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

EXPERTS = "experts"
"""Name of the module with a block's experts."""
ROUTERS = ("gate", "router")
"""Names of the module that chooses the experts of a token."""
READ_BY_KERNELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types of models with state-space layers for which peft refuses some modules."""
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""Names of matrices of experts, shared experts and dense feed-forward layers, which peft moves to the experts."""


def has_experts(config: Any) -> bool:
    """Return True for a config whose layers have experts; Granite 4 has a type of model for both kinds of layers."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def router_loss_weight(config: Any) -> float:
    """Return the weight of the load-balancing loss that a config asks for; 0 for a model without experts."""
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)) if has_experts(config) else 0.0


def mixture_blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and module of each feed-forward block with experts."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, EXPERTS, None), nn.Module):
            yield name, module


def routers(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of all routers by name."""
    parameters: dict[str, nn.Parameter] = {}
    for block, module in mixture_blocks(model):
        for child in ROUTERS:
            router = getattr(module, child, None)
            if isinstance(router, nn.Module):
                parameters |= {f"{block}.{child}.{name}": value for name, value in router.named_parameters()}
    return parameters


def expert_matrices(model: Any) -> list[str]:
    """Return the names, from ``experts`` on, of the parameters with three dimensions, as peft's targets name them."""
    names = {
        f"{EXPERTS}.{name}"
        for _, block in mixture_blocks(model)
        for name, parameter in block.experts.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    return sorted(names)


def matrices_outside_experts(model: Any) -> list[str]:
    """Return the linear layers that adapters train by default in a mixture: attention, not routers or feed-forward."""
    blocks = [f"{name}." for name, _ in mixture_blocks(model)]
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name.rpartition(".")[2] not in (*FEED_FORWARD, "score")
        and not name.startswith(tuple(blocks))
    ]


def default_targets(model: Any) -> str | list[str]:
    """Return the modules that ``all-linear`` adapts: all matrices but the head if the model allows it.

    A mixture's experts and routers are skipped. The fused kernels of some state-space models read the weights of
    ``out_proj`` and ``conv1d`` without calling the modules, so peft refuses to adapt them.
    """
    if has_experts(model.config):
        return matrices_outside_experts(model)
    if model.config.model_type not in READ_BY_KERNELS:
        return "all-linear"
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name.rpartition(".")[2] not in ("out_proj", "conv1d", "score")
    ]


def freeze_routers(model: Any) -> int:
    """Freeze the routers of a mixture of experts and return the number of their parameters."""
    parameters = list(routers(model).values())
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)
