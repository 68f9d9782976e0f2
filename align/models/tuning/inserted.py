"""Insert trained modules into a frozen transformers model, which keeps its class and its weights' names.

An insertion is a submodule of the module that it changes, plus a hook on that module. No module is replaced, so trl,
transformers and align still see the model they know. The trainer's checkpoints hold the trained tensors only. To run
the model as it started, other values are put into its trained parameters for a while. Excluded: what the insertions
compute (``virtual_tokens``, ``inserted_methods``).

Attention and MLP modules are found by the names that most decoders of transformers use. Decoders that fuse these
matrices or use other names (GPT-2, GPT-NeoX, Phi-3) are refused.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from align.errors import UserError
from align.models.compute.precision import without_autocast_cache
from align.patches.transformers import save_only


@contextmanager
def swapped_values(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, ``parameters`` hold the ``values`` of the same names and shapes.

    The tensors behind the parameters are exchanged, not overwritten: a graph that was built before still needs the old
    ones for its backward pass. Raises ``UserError`` for a partitioned parameter, which is gathered from memory of its
    own, where the exchange would have no effect.
    """
    if any(_is_partitioned(parameter) for parameter in parameters.values()):
        raise UserError(
            "the adapters were part of the initial model, and a partitioned model cannot return to it: fsdp2 and "
            "stage 3 of deepspeed always gather the current adapters. Use `strategy: ddp`."
        )
    original = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter.device, parameter.dtype)
    try:
        # Autocast may hold a bf16 copy of the values from before the exchange.
        with without_autocast_cache():
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = original[name]


def _is_partitioned(parameter: torch.Tensor) -> bool:
    """Return True for a parameter that FSDP2 or ZeRO-3 has sharded."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


WEIGHTS = "model.safetensors"
"""File from which transformers' Trainer resumes a checkpoint's weights."""


class Insertion(nn.Module):
    """A trained module inside a frozen one; without ``enabled`` the frozen module computes as before."""

    enabled: bool = True


def insertions(model: nn.Module) -> dict[str, Insertion]:
    """Return the insertions of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Insertion)}


def inserted_weights(model: nn.Module, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """Return the insertions' tensors, of any shape, by their names in ``model``; with ``keep_vars`` not detached."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in insertions(model).items():
        weights |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=keep_vars).items()}
    return weights


def train_insertions_only(model: Any, started: bool = False) -> Any:
    """Freeze ``model`` except its insertions and a reward model's score head, and save only these in checkpoints.

    The model gets ``disable_adapter()``, as peft's models have it: a context in which it is the initial model. For
    insertions that were trained before (``started``) the initial model includes them as they are now.
    """
    inserted = insertions(model)
    model.initial_insertions = None
    if started:
        # A critic is a second tree of modules over the policy's tensors, and both train their insertions.
        for insertion in inserted.values():
            _copy_parameters(insertion)
        model.initial_insertions = {name: tensor.clone() for name, tensor in inserted_weights(model).items()}
    model.requires_grad_(False)
    for module in inserted.values():
        module.float().requires_grad_(True)
    if isinstance(getattr(model, "score", None), nn.Module):
        model.score.requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_only(model, trained, _save_trained)
    model.disable_adapter = types.MethodType(_without_insertions, model)
    return model


def _copy_parameters(insertion: nn.Module) -> None:
    for module in insertion.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone()))


def _save_trained(model: nn.Module, save_directory: Any, **_: Any) -> None:
    """Save the trained tensors only; replaces ``save_pretrained``, which the Trainer calls for a checkpoint."""
    from safetensors.torch import save_file

    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})


@contextlib.contextmanager
def _without_insertions(model: Any) -> Iterator[None]:
    """Inside, ``model`` is the initial one; afterwards its insertions are as before."""
    # The initial model had trained insertions already: they are swapped back, not switched off.
    if model.initial_insertions is not None:
        with swapped_values(inserted_weights(model, keep_vars=True), model.initial_insertions):
            yield
        return
    before = {module: module.enabled for module in insertions(model).values()}
    for module in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before.items():
            module.enabled = enabled


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: PreTrainedModel, method: str) -> list[Any]:
    """Return the layers from first to last. Raises ``UserError`` if they have no ``self_attn`` and ``mlp``."""
    # The trunk itself may be passed as well.
    trunk = getattr(model, model.base_model_prefix, model)
    layers = list(getattr(trunk, "layers", []))
    if not layers or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise _unsupported(model, method, "layers of self_attn and mlp")
    return layers


def attentions(model: PreTrainedModel, method: str) -> list[Any]:
    """Return each layer's attention, with a matrix each for queries, keys, values and output."""
    modules = [layer.self_attn for layer in decoder_layers(model, method)]
    if not all(_has(module, ATTENTION) for module in modules):
        raise _unsupported(model, method, f"attention made of {', '.join(ATTENTION)}")
    return modules


def gated_mlps(model: PreTrainedModel, method: str) -> list[Any]:
    """Return each layer's MLP, made of ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``."""
    modules = [layer.mlp for layer in decoder_layers(model, method)]
    if not all(_has(module, GATED) and hasattr(module, "act_fn") for module in modules):
        raise _unsupported(model, method, f"a gated MLP of {', '.join(GATED)}")
    return modules


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _unsupported(model: PreTrainedModel, method: str, expected: str) -> UserError:
    return UserError(
        f"tuning.method: {method} needs {expected}, which this {model.config.model_type} lacks. Use lora, or a "
        "model of the llama, mistral, qwen2, qwen3 or smollm3 kind."
    )
