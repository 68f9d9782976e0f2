"""Shard a model over processes by FSDP2 (torch's ``fully_shard``), and gather the full model where it is needed.

accelerate's own FSDP2 plugin does the same on GPUs, but is silently ignored on CPUs. The Trainer's side is in
``align.training.sharded``. Names and order of parameters stay as in the plain model, so files on disk are the same
as from one process. Excluded: loading without a full model in each process's memory first.

The full model is gathered into a shell: the same modules without memory, copied before sharding. ``full_model`` fills
its parameters with the gathered tensors, and empties it again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from align.config.runtime.launch import FsdpConfig, world_size
from align.errors import UserError

_SHELLS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""Sharded model -> its shell: the same modules, unsharded, over parameters on the meta device."""


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 has sharded ``model``."""
    return isinstance(model, FSDPModule)


def is_partitioned(model: nn.Module) -> bool:
    """Return True if FSDP2 or ZeRO-3 has sharded the weights, so modules cannot run one by one."""
    return is_sharded(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shard(model: nn.Module, options: FsdpConfig, device: torch.device) -> None:
    """Shard every parameter of ``model``, in place; all processes hold the same model before.

    A layer's parameters are gathered together when it runs, those outside the layers for the whole step.
    """
    # The shell is copied before sharding, while the parameters still have their full shapes.
    _SHELLS[model] = _make_shell(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    offload = CPUOffloadPolicy() if options.offload and device.type == "cuda" else OffloadPolicy()
    names = _layer_classes(model)
    layers = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    # Layers become their own units: their parameters are gathered for one layer at a time.
    separate_shared_parameters(model, layers)
    for module in layers:
        fully_shard(module, mesh=mesh, reshard_after_forward=options.reshard_after_forward, offload_policy=offload)
    # Everything outside the layers (embeddings, last norm, heads) is one unit that stays gathered during a step.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=offload)


def _layer_classes(model: nn.Module) -> set[str]:
    """Return the classes that transformers marks as not to be split: the layers."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    return names


def separate_shared_parameters(model: nn.Module, layers: list[nn.Module]) -> None:
    """Copy frozen parameters that two layers share, as a critic with adapters next to its policy has them.

    FSDP2 allows a parameter in one group only. Raises ``UserError`` for a trained parameter in two layers.
    """
    # Every layer is a group of modules; so is everything outside the layers.
    inside = {id(part) for layer in layers for part in layer.modules()}
    around = [part for part in model.modules() if id(part) not in inside]
    seen_ids: set[int] = set()
    for group in [*(list(layer.modules()) for layer in layers), around]:
        copies: dict[int, nn.Parameter] = {}
        for part in group:
            for name, parameter in part._parameters.items():
                if parameter is None or id(parameter) not in seen_ids:
                    continue
                if parameter.requires_grad:
                    raise UserError(
                        f"strategy fsdp2: two layers share {name} of {type(part).__name__}, which is trained; use ddp."
                    )
                # Within a group a shared parameter stays shared: all its names get the same copy.
                copied = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=False))
                part._parameters[name] = copied
        seen_ids |= {id(p) for part in group for p in part._parameters.values() if p is not None}


def _make_shell(model: nn.Module) -> nn.Module:
    """Copy the modules over parameters on the meta device; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor of any shape to the CPU; call it in all processes. A plain one is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(tensor.device_mesh.device_type)  # offloaded shards move to the GPU for it
    gathered: torch.Tensor = on_device.full_tensor()
    return gathered.cpu()


def local_shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a full ``tensor``, sharded as ``like``, which has the same shape.

    The tensor is unchanged if ``like`` is plain.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(like.device_mesh.device_type, like.dtype)
    # Every process has the full tensor already, so none has to send it (src_data_rank).
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


@torch.no_grad()
def load_weights(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy full tensors into the parameters of these names and shapes."""
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        parameters[name].copy_(local_shard(value, parameters[name]))


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so each process holds its shard only, as readers and writers of them expect.

    Parameters outside the layers stay gathered after a forward pass, for the backward pass that may follow.
    """
    for module in model.modules() if is_sharded(model) else ():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def full_model(model: nn.Module, store: bool = False) -> Iterator[Any]:
    """Inside, yield ``model`` with all of its weights in every process: itself, or a plain copy on the CPU.

    All processes must enter it. With ``store`` changes to the weights are written back to the model.
    """
    # A model without a shell was not sharded by FSDP2. ZeRO-3 gathers into the model's own parameters.
    shell = _SHELLS.get(model) if isinstance(model, nn.Module) else None
    if shell is None:
        with _gather_zero_parameters(model, store):
            yield model
        return
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shell_parameters = dict(shell.named_parameters())
    # One full parameter per parameter of the shell, keyed by the shell parameter's id, so tied names stay tied.
    full_parameters = {
        id(parameter): nn.Parameter(full_tensor(parameters[name].detach()), parameter.requires_grad)
        for name, parameter in shell_parameters.items()
    }
    _set_parameters(shell, full_parameters)
    try:
        shell.train(model.training)
        yield shell
        if store:
            load_weights(
                model, {name: full_parameters[id(parameter)].detach() for name, parameter in shell_parameters.items()}
            )
    finally:
        # The shell gets its parameters without memory back, which frees the gathered ones.
        _set_parameters(
            shell, {id(full_parameters[id(parameter)]): parameter for parameter in shell_parameters.values()}
        )


@contextmanager
def _gather_zero_parameters(model: nn.Module, store: bool) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has partitioned are full; with ``store`` the first process's values are kept."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")] if isinstance(model, nn.Module) else []
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if store else None):
        yield


def _set_parameters(shell: nn.Module, values: dict[int, nn.Parameter]) -> None:
    for module in shell.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in values:
                module._parameters[name] = values[id(parameter)]
