"""Find the parts of a mixture of experts: its blocks, their routers and expert matrices, and the routers' loss.

transformers stores the experts of a block as parameters of three dimensions, (experts, in, out) or (experts, out, in),
of a module called ``experts``. The router that chooses among them is another child of the same block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.models.compute.layers import FEED_FORWARD, KERNEL_MATRICES, READ_BY_KERNELS
from align.patches.transformers import computes_router_loss, record_router_logits

EXPERTS = "experts"
"""Name of the module with a block's experts."""
ROUTERS = ("gate", "router")
"""Names of the module that chooses the experts of a token."""


def has_experts(config: Any) -> bool:
    """Return True for a config whose layers have experts; Granite 4 has a type of model for both kinds of layers."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def router_loss_weight(model: PreTrainedModel) -> float:
    """Return the weight of the load-balancing loss that a model's config asks for.

    It is 0 for a model without experts, and for a class that computes no such loss, as Llama 4's.
    """
    config = model.config
    if not has_experts(config) or not computes_router_loss(model):
        return 0.0
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", 0.0))


def return_router_logits(model: PreTrainedModel) -> None:
    """Let a Granite mixture return its routers' logits, which its load-balancing loss needs."""
    if str(model.config.get_text_config().model_type).startswith("granitemoe"):
        for _, block in mixture_blocks(model):
            record_router_logits(model, type(block.router))
            return


def mixture_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of each feed-forward block with experts."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, EXPERTS, None), nn.Module):
            yield name, module


def routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all routers by name."""
    parameters: dict[str, nn.Parameter] = {}
    for block, module in mixture_blocks(model):
        for child in ROUTERS:
            router = getattr(module, child, None)
            if isinstance(router, nn.Module):
                parameters |= {f"{block}.{child}.{name}": value for name, value in router.named_parameters()}
    return parameters


def expert_matrices(model: nn.Module) -> list[str]:
    """Return the names, from ``experts`` on, of the parameters with three dimensions, as peft's targets name them."""
    names = {
        f"{EXPERTS}.{name}"
        for _, block in mixture_blocks(model)
        for name, parameter in block.experts.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    return sorted(names)


def default_targets(model: PreTrainedModel) -> str | list[str]:
    """Return the modules that ``all-linear`` adapts: all matrices but the head if the model allows it.

    A mixture's experts, routers and feed-forward layers are skipped. So are matrices that the fused kernels of
    state-space layers read without calling the modules, because kernels would ignore adapters on them.
    """
    is_mixture = has_experts(model.config)
    is_read = model.config.get_text_config().model_type in READ_BY_KERNELS
    if not is_mixture and not is_read:
        return "all-linear"
    skipped = ("score", *(FEED_FORWARD if is_mixture else ()), *(KERNEL_MATRICES if is_read else ()))
    blocks = tuple(f"{name}." for name, _ in mixture_blocks(model))
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name.rpartition(".")[2] not in skipped
        and not name.startswith(blocks)
    ]


@contextlib.contextmanager
def record_experts(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that gets the experts of all tokens, sorted: (N, k) for each mixture block in each call.

    Blocks call their ``experts`` with the states, the chosen experts and their weights.
    """
    choices: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        choices.append(args[1].detach().flatten(0, -2).sort(dim=-1).values.cpu())

    handles = [block.experts.register_forward_pre_hook(record) for _, block in mixture_blocks(model)]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def token_experts(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the sorted experts of each row's tokens, (L, T, k) for L layers, computed one row at a time."""
    device = next(model.parameters()).device
    experts = []
    for row in rows:
        with record_experts(model) as choices:
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
        experts.append(torch.stack(choices))
    return experts


def router_disagreement(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return the share of choices, of a token in a layer, with other experts, from ``token_experts`` (L, T, k)."""
    differs = [(a != b).any(dim=-1).flatten() for a, b in zip(first, second, strict=True)]
    return float(torch.cat(differs).float().mean())


def freeze_routers(model: nn.Module) -> int:
    """Freeze the routers of a mixture of experts and return the number of their parameters."""
    parameters = list(routers(model).values())
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)
