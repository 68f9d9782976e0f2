"""Layers of peft around a model's own: found, merged into plain weights one at a time, and LoRA as one function.

The live model is never touched by a merge: merging in place and unmerging rounds the base a little every time (30 % of
the weights changed after 20 cycles in bf16). Each merged matrix exists only while the caller holds it. Plain LoRA adds
its product to the matrix. Every other method is merged by peft's own code, on a copy of the one layer. A matrix in
4 bits is dequantized first. All in float32.

peft computes ``x W^T + s (x A^T) B^T`` with a tensor of the output's size for each product, for the scaled one and for
the sum, and autograd goes through four more in the backward pass. ``FusedLoraLinear`` adds the low-rank product to the
other by the product itself. ``align.patches.peft`` puts it in the place of peft's layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from align.models.tuning import HIGH, LOW, SCALE
from align.models.tuning.stored import plain_weights
from align.patches.peft import has_hooks, replace_lora_linear

PEFT_PREFIX = "base_model.model."
ADAPTER = ".token_adapter"
"""Last part of the name of peft's layer inside the module that it wraps."""


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that peft wraps around the model's own, by the plain name of the wrapped module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


Base = Mapping[str, torch.Tensor]
"""Frozen weights by plain name, to fold adapters into instead of the live weights."""


def merged_weights(
    model: PreTrainedModel | PeftModel, base: Base = MappingProxyType({})
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every weight and saved buffer of ``model``, in their shapes without adapters.

    A tied head comes under both names. Tensors that no adapter changes are those of ``base``, or the model's own, not
    copies. The others are float32. Raises ``ValueError`` for an adapter that cannot be merged.
    """
    if isinstance(model, PeftModel):
        return _weights(model, merge_layer, base)
    return iter(plain_weights(model, base).items())


@torch.no_grad()
def _weights(
    model: nn.Module,
    parts: Callable[[Any, Base], dict[str, torch.Tensor]],
    base: Base = MappingProxyType({}),
    *,
    adapted_only: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a peft model as ``merged_weights`` does; ``parts`` returns the tensors of an adapted layer.

    ``adapted_only`` skips weights that no adapter changes.
    """
    layers = tuner_layers(model)
    # Matrices in 4 bits without an adapter, by the plain name of their module.
    four_bit = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
    }
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
        if layer is None and adapted_only:
            continue
        if layer is None:
            quantized = four_bit.get(_quantized_module(name))
            if quantized is None:
                yield name, base.get(name, tensor)
            elif name.endswith(".weight"):
                yield name, float_weight(quantized)
            elif name.endswith(".bias"):
                yield name, tensor
        elif layer not in merged_layers:
            # All tensors of an adapted layer come at once, at the first of them.
            merged_layers.add(layer)
            if is_trained_rows(layers[layer]):
                tied = layers[layer].tied_adapter or layers[layer]
                if tied not in embeddings:
                    embeddings[tied] = merged_rows(layers[layer], base.get(f"{layer.removesuffix(ADAPTER)}.weight"))
                yield f"{layer.removesuffix(ADAPTER)}.weight", embeddings[tied]
                continue
            own_names = layers[layer].get_base_layer().state_dict()
            stored = {name: base[f"{layer}.{name}"] for name in own_names if f"{layer}.{name}" in base}
            for leaf, value in parts(layers[layer], stored).items():
                yield f"{layer}.{leaf}", value


def is_low_rank(layer: Any) -> bool:
    """Return True for plain LoRA on a matrix, whose update is the product of two matrices and a number."""
    if isinstance(layer, ParamWrapper) or not _is_plain_lora(layer) or len(layer.lora_A) != 1:
        return False
    (adapter,) = layer.lora_A
    return (
        isinstance(layer.get_base_layer(), torch.nn.Linear)
        and layer.active_adapters == [adapter]
        and layer.lora_B[adapter].bias is None
    )


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes in a peft model whose layers are low-rank or trained rows, without copies.

    Rows and modules that are trained come as whole tensors, matrices as the parts of their update.
    """

    def parts(layer: Any, stored: Base) -> dict[str, torch.Tensor]:
        (adapter,) = layer.lora_A
        return {
            f"weight{LOW}": layer.lora_A[adapter].weight.detach().float(),
            f"weight{HIGH}": layer.lora_B[adapter].weight.detach().float(),
            f"weight{SCALE}": torch.tensor(layer.scaling[adapter], dtype=torch.float64),
        }

    return dict(_weights(model, parts, adapted_only=True))


def frozen_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that ``adapter_tensors`` belong to, as ``merged_weights`` does. Matrices in 4 bits become
    float32."""

    def parts(layer: Any, stored: Base) -> dict[str, torch.Tensor]:
        base = layer.get_base_layer()
        weight = base.weight.detach() if base.weight.is_floating_point() else float_weight(base)
        return {**_own_tensors(base), "weight": weight}

    return _weights(model, parts)


def _quantized_module(name: str) -> str:
    """Return the module of a tensor; a matrix in 4 bits has more tensors, called ``weight.absmax`` and so on."""
    return name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]


def _adapted_layer_of(name: str, layers: dict[str, Any]) -> str | None:
    """Return the adapted layer that contains the tensor ``name``; the outermost of several around the same module."""
    outermost = None
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            outermost = name
    return outermost


@torch.no_grad()
def merge_layer(layer: Any, stored: Base = MappingProxyType({})) -> dict[str, torch.Tensor]:
    """Return weight, bias and buffers, in their shapes, of the module that ``layer`` wraps, its adapters merged.

    Matrices are float32. Tensors of ``stored`` replace the module's own, by their names in it. Raises ``ValueError``
    for a method that cannot be merged.
    """
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return _merge_experts(layer, stored)
    weight = stored.get("weight") if base.weight.is_floating_point() else None
    if weight is None:
        weight = float_weight(base)
    # The base may be in the machine's memory, the adapters are on the device.
    weight = weight.to(next((p.device for p in layer.parameters() if p.requires_grad), weight.device))
    if _is_plain_lora(layer):
        # A sum in float32: in bf16 a small update would vanish next to the weight.
        merged = weight.float().clone()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                merged += layer.get_delta_weight(adapter).float()
        return {**_own_tensors(base), "weight": merged}
    layer_copy = copy.deepcopy(layer)
    merge = type(layer_copy).merge
    if base.weight.is_floating_point():
        # peft merges in the type of the matrix.
        layer_copy.get_base_layer().weight = torch.nn.Parameter(weight.float().clone(), requires_grad=False)
    if getattr(base.weight, "quant_state", None) is not None:
        # The layer of a 4-bit matrix would quantize the sum. The layer of a plain matrix merges in the matrix's type.
        layer_copy.base_layer = _dequantize(base)
        merge = Linear.merge
    try:
        merge(layer_copy, safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{type(layer).__name__} cannot be merged into the weights: {error}") from None
    return _own_tensors(layer_copy.get_base_layer())


def _merge_experts(layer: Any, stored: Base) -> dict[str, torch.Tensor]:
    """Return the tensors of a module of experts; peft wraps it once for each of its adapted parameters."""
    tensors = {name: tensor.detach() for name, tensor in layer.get_base_layer().state_dict().items()} | dict(stored)
    while hasattr(layer, "parameter_name"):
        merged = tensors[layer.parameter_name].float()
        for adapter in layer.active_adapters:
            update = layer.get_delta_weight(adapter).float()
            merged = merged.to(update.device) + update
        tensors[layer.parameter_name] = merged
        layer = layer.base_layer
    return tensors


def float_weight(module: Any) -> torch.Tensor:
    """Return the module's weight, of shape (out, in), in float32, dequantized if it is in 4 bits."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        weight: torch.Tensor = module.weight.data.float()
        return weight
    import bitsandbytes

    quantized = module.weight.data.to(state.absmax.device)  # the scales stay on the device
    dequantized: torch.Tensor = bitsandbytes.functional.dequantize_4bit(quantized, state)
    return dequantized.float()


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
    linear = torch.nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(float_weight(quantized), requires_grad=False)
    linear.bias = quantized.bias
    return linear


def set_dora_magnitudes(peft_model: Any) -> None:
    """Compute DoRA's row norms in float32: peft computes them in the type of the matrix, and before LoftQ's values."""
    for layer in peft_model.modules():
        magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
        if "default" in magnitudes and isinstance(layer.get_base_layer(), torch.nn.Linear):
            update = layer.get_delta_weight("default")
            lengths = (float_weight(layer.get_base_layer()) + update).norm(dim=1)
            magnitudes["default"].weight.data = lengths.to(update.dtype)


def is_trained_rows(layer: Any) -> bool:
    """Return True for peft's layer of trained rows."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return isinstance(layer, TrainableTokensLayer)


def merged_rows(layer: Any, stored: torch.Tensor | None = None) -> torch.Tensor:
    """Return the matrix (V, hidden) of a layer of trained rows with their values in it, in float32.

    ``stored`` replaces the layer's own matrix.
    """
    weight: torch.Tensor = layer.get_base_layer().weight.detach() if stored is None else stored
    merged = weight.float().clone()
    for adapter in layer.active_adapters:
        rows = layer.trainable_tokens_delta[adapter]
        merged = merged.to(rows.device)
        merged[torch.tensor(layer.token_indices[adapter], device=merged.device)] = rows.detach().float()
    return merged


class FusedLoraLinear(Linear):
    """peft's LoRA layer on a matrix; calls that the fused function does not cover use peft's forward pass."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        adapter = None if args or kwargs else self._find_only_adapter()
        weight: Any = self.base_layer.weight
        # peft's own path serves everything else: several adapters, dropout in training, weights shared among processes.
        if adapter is None or not _is_whole(weight):
            return super().forward(x, *args, **kwargs)
        low = self.lora_A[adapter].weight
        high = self.lora_B[adapter].weight
        bias: Any = self.base_layer.bias
        tensors: list[Any] = [x, weight, low, high, *([] if bias is None else [bias])]
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            tensors = [tensor.to(dtype) for tensor in tensors]
        # Without autocast, peft converts between the types itself.
        elif len({tensor.dtype for tensor in tensors}) > 1:
            return super().forward(x)
        x, weight, low, high, *biases = tensors
        output: torch.Tensor = _LowRankSum.apply(
            x, weight, biases[0] if biases else None, low, high, self.scaling[adapter]
        )
        return output

    def _find_only_adapter(self) -> str | None:
        """Return the only active adapter, if it is plain LoRA without any other part."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        name = names[0]
        base = self.base_layer
        dropout = self.lora_dropout[name]
        if isinstance(dropout, torch.nn.Dropout) and dropout.training and dropout.p > 0:
            return None
        matrices = (base, self.lora_A[name], self.lora_B[name])
        are_plain = name not in self.lora_variant and all(type(matrix) is torch.nn.Linear for matrix in matrices)
        if not are_plain or self.lora_B[name].bias is not None or base.weight.requires_grad:
            return None
        return None if any(map(has_hooks, (*matrices, dropout))) else name


def fuse_lora(model: nn.Module) -> None:
    """Compute ``model``'s LoRA layers on plain matrices by the fused function, in place."""
    replace_lora_linear(model, FusedLoraLinear)


def _is_whole(weight: torch.Tensor) -> bool:
    """Return True for a weight that no wrapper has shared out among processes."""
    return type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.dim() == 2 and not hasattr(weight, "ds_id")


class _LowRankSum(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T of x (..., in), frozen W (out, in) and b (out,), trained A (r, in) and B (out, r)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ low.t()  # (N, r)
        output = torch.nn.functional.linear(rows, weight, bias)
        # The product is added in place, without another tensor of the output's size.
        output.addmm_(narrow, high.t(), alpha=scale)
        # Views: a parameter whose values are swapped before the backward pass leaves them as they were.
        ctx.save_for_backward(rows, narrow, weight, low.t(), high.t())
        ctx.scale = scale
        ctx.shape = x.shape
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(..., out) -> gradients of x, A and B in their shapes."""
        rows, narrow, weight, low_view, high_view = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        # The gradient of x A^T, which the gradients of x and A share.
        grad_narrow = (grad @ high_view.t()).mul_(ctx.scale)  # (N, r)
        grad_x = grad_low = grad_high = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_narrow, low_view.t()).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_low = grad_narrow.t() @ rows
        if ctx.needs_input_grad[4]:
            # The narrow matrix goes first: the product is several times as fast on a CPU.
            grad_high = (narrow.t() @ grad).mul_(ctx.scale).t()
        return grad_x, None, None, grad_low, grad_high, None
