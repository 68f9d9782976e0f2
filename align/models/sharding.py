"""A model in parts, one for each process (FSDP2): torch's ``fully_shard``, and the whole model again where it is due.

accelerate's own FSDP2 plugin does the same on GPUs and is left aside on CPUs without a word, so its other half, the
Trainer's side, is in ``align.training.sharded``. Names and order of parameters stay those of the plain model: what is
written to disk is what one process would write. Left out: loading without a whole model in each process' memory first.
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

from align.config.launch import FsdpConfig, world_size
from align.errors import UserError

_SHELLS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""Sharded model -> the same modules, unsharded, with nothing in them."""


def is_sharded(model: Any) -> bool:
    """Whether this process holds a part of ``model`` only."""
    return isinstance(model, FSDPModule)


def in_parts(model: nn.Module) -> bool:
    """Whether its weights are shared out, by FSDP2 or by ZeRO-3, so that its modules cannot be run one by one."""
    return is_sharded(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shard(model: nn.Module, options: FsdpConfig, device: torch.device) -> None:
    """Leave each process its part of every parameter of ``model``, in place; all processes hold the same one before.

    A layer's parameters are gathered together when it runs, those around the layers for the whole step.
    """
    _SHELLS[model] = _shell(model)
    mesh = init_device_mesh(device.type, (world_size(),))
    offload = CPUOffloadPolicy() if options.offload and device.type == "cuda" else OffloadPolicy()
    names = _layer_classes(model)
    layers = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    give_each_its_own(model, layers)
    for module in layers:
        fully_shard(module, mesh=mesh, reshard_after_forward=options.reshard_after_forward, offload_policy=offload)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=offload)


def _layer_classes(model: nn.Module) -> set[str]:
    """Classes that transformers says must stay in one piece: the layers."""
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def give_each_its_own(model: nn.Module, layers: list[nn.Module]) -> None:
    """Frozen parameters of one layer that are another's too (a critic beside its policy, with adapters) become copies.

    A parameter has its parts in one group alone. Raises ``UserError`` for a trained one in two layers.
    """
    inside = {id(part) for layer in layers for part in layer.modules()}
    around = [part for part in model.modules() if id(part) not in inside]
    taken: set[int] = set()
    for group in [*(list(layer.modules()) for layer in layers), around]:
        own: dict[int, nn.Parameter] = {}
        for part in group:
            for name, parameter in part._parameters.items():
                if parameter is None or id(parameter) not in taken:
                    continue
                if parameter.requires_grad:
                    raise UserError(
                        f"strategy fsdp2: a weight that is trained, {name} of {type(part).__name__}, is part of two "
                        "layers, which cannot be shared out; take ddp."
                    )
                copied = own.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=False))
                part._parameters[name] = copied
        taken |= {id(p) for part in group for p in part._parameters.values() if p is not None}


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the modules over parameters without memory; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that processes share, on the CPU; called by all of them. A plain one is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)  # parts that are kept on the CPU come to the GPU for it
    gathered: torch.Tensor = there.full_tensor()
    return gathered.cpu()


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole ``tensor``, as ``like`` is shared out; ``tensor`` itself where it is not."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(like.device_mesh.device_type, like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


@torch.no_grad()
def put(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into the parameters of these names."""
    forget_gathered(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, value in values.items():
        named[name].copy_(part(value, named[name]))


def forget_gathered(model: Any) -> None:
    """Have each process hold its part again, and nothing else, as what reads or changes parameters expects.

    What stands around the layers stays gathered after a pass, for the backward pass that may follow.
    """
    for module in model.modules() if is_sharded(model) else ():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(model: Any, store: bool = False) -> Iterator[Any]:
    """``model`` with all of its weights, in every process: itself, or a plain copy on the CPU while this lasts.

    All processes enter it. With ``store`` what became of the weights inside is put into the model.
    """
    shell = _SHELLS.get(model) if isinstance(model, nn.Module) else None
    if shell is None:
        with _gathered_by_zero(model, store):
            yield model
        return
    forget_gathered(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    empty = dict(shell.named_parameters())
    filled = {
        id(parameter): nn.Parameter(full(named[name].detach()), parameter.requires_grad)
        for name, parameter in empty.items()
    }
    _exchange(shell, filled)
    try:
        shell.train(model.training)
        yield shell
        if store:
            put(model, {name: filled[id(parameter)].detach() for name, parameter in empty.items()})
    finally:
        _exchange(shell, {id(filled[id(parameter)]): parameter for parameter in empty.values()})


@contextmanager
def _gathered_by_zero(model: Any, store: bool) -> Iterator[None]:
    """Inside, the parameters of a model in DeepSpeed's stage 3 are whole; with ``store`` the first process's stay."""
    given = [p for p in model.parameters() if hasattr(p, "ds_id")] if isinstance(model, nn.Module) else []
    if not given:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(given, modifier_rank=0 if store else None):
        yield


def _exchange(shell: nn.Module, values: dict[int, nn.Parameter]) -> None:
    for module in shell.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in values:
                module._parameters[name] = values[id(parameter)]
