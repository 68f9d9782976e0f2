"""Weights of a trained model under their plain transformers names, adapters merged one layer at a time.

The live model is never touched: merging in place and unmerging rounds the base a little every time (30 % of the weights
changed after 20 cycles in bf16). Each merged matrix exists only while the caller holds it.

Plain LoRA adds its product to the matrix. Every other method is merged by peft's own code, on a copy of the one layer.
A matrix in 4 bits is dequantized first. All in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from align.models.tuning.layers import ADAPTER, PEFT_PREFIX, is_trained_rows, merged_rows, tuner_layers
from align.models.tuning.stored import plain_weights


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every weight and saved buffer of ``model``, in their shapes without adapters.

    A tied head comes under both names. Tensors that no adapter changes are the model's own, not copies; the others are
    float32. Raises ``ValueError`` for an adapter that cannot be merged.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield from plain_weights(model).items()
        return
    layers = tuner_layers(model)
    merged_layers: set[str] = set()
    embeddings: dict[Any, torch.Tensor] = {}  # with trained rows; a tied head has the embedding's tensor
    for full_name, tensor in model.state_dict().items():
        name = full_name.removeprefix(PEFT_PREFIX)
        # Skip what all layers of a method share (outside the base model) and the unused originals of modules_to_save.
        if name == full_name or ".original_module." in name:
            continue
        if ".modules_to_save." in name:  # trained in full: MODULE.modules_to_save.ADAPTER.LEAF -> MODULE.LEAF
            module, _, rest = name.partition(".modules_to_save.")
            yield f"{module}.{rest.partition('.')[2]}", tensor
            continue
        layer = _adapted_layer_of(name, layers)
        if layer is None:
            yield name, tensor
        elif layer not in merged_layers:
            # All tensors of an adapted layer come at once, at the first of them.
            merged_layers.add(layer)
            if is_trained_rows(layers[layer]):
                tied = layers[layer].tied_adapter or layers[layer]
                if tied not in embeddings:
                    embeddings[tied] = merged_rows(layers[layer])
                yield f"{layer.removesuffix(ADAPTER)}.weight", embeddings[tied]
                continue
            for leaf, value in merge_layer(layers[layer]).items():
                yield f"{layer}.{leaf}", value


def _adapted_layer_of(name: str, layers: dict[str, Any]) -> str | None:
    """Return the adapted layer that contains the tensor ``name``; the outermost of several around the same module."""
    outermost = None
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            outermost = name
    return outermost


@torch.no_grad()
def merge_layer(layer: Any) -> dict[str, torch.Tensor]:
    """Return weight, bias and buffers, in their shapes, of the module that ``layer`` wraps, its adapters merged.

    Matrices are float32. Raises ``ValueError`` for a method that cannot be merged.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return _merge_experts(layer)
    if _is_plain_lora(layer):
        # A sum in float32: in bf16 a small update would vanish next to the weight.
        merged = float_weight(base).clone()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                merged += layer.get_delta_weight(adapter).float()
        return {**_own_tensors(base), "weight": merged}
    layer_copy = copy.deepcopy(layer)
    merge = type(layer_copy).merge
    if getattr(base.weight, "quant_state", None) is not None:
        # The layer of a 4-bit matrix would quantize the sum. The layer of a plain matrix merges in the matrix's type.
        layer_copy.base_layer = _dequantize(base)
        merge = Linear.merge
    try:
        merge(layer_copy, safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{type(layer).__name__} cannot be merged into the weights: {error}") from None
    return _own_tensors(layer_copy.get_base_layer())


def _merge_experts(layer: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a module of experts; peft wraps it once for each of its adapted parameters."""
    tensors = {name: tensor.detach() for name, tensor in layer.get_base_layer().state_dict().items()}
    while hasattr(layer, "parameter_name"):
        merged = tensors[layer.parameter_name].float()
        for adapter in layer.active_adapters:
            merged = merged + layer.get_delta_weight(adapter).float()
        tensors[layer.parameter_name] = merged
        layer = layer.base_layer
    return tensors


def float_weight(module: Any) -> torch.Tensor:
    """Return the module's weight, of shape (out, in), in float32, dequantized if it is in 4 bits."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = module.weight.data.float()
        return weight
    from align.models.tuning.quantized import dequantized

    return dequantized(module)


def _own_tensors(module: Any) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    if getattr(module.weight, "quant_state", None) is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if "." not in name}  # without the quantization state


def _is_plain_lora(layer: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and not layer.lora_variant


def _dequantize(quantized: Any) -> torch.nn.Linear:
    """Return the float32 layer of a 4-bit matrix."""
    plain = torch.nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(float_weight(quantized), requires_grad=False)
    plain.bias = quantized.bias
    return plain
