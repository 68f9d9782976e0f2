"""QLoRA (arXiv 2305.14314): adapters next to matrices that bitsandbytes keeps in 4 bits, on GPUs and CPUs.

The matrices of the layers are quantized; embeddings, norms and heads are not. LoftQ (arXiv 2310.08659) is computed here
with one round of quantization and decomposition, because peft's own needs a GPU. Excluded: 8 bits, other libraries, and
models that come quantized.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.config.tuning import QloraTuning
from align.errors import UserError
from align.models.tuning import lora
from align.models.tuning.peft_layers import float_weight, set_dora_magnitudes, tuner_layers

try:
    bnb: Any = importlib.import_module("bitsandbytes")
except ModuleNotFoundError:
    raise UserError(
        "tuning: qlora needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or use `method: lora`."
    ) from None


class QuantizedLinear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A linear layer in 4 bits that computes in autocast's type, as a plain one does.

    bitsandbytes' own layer keeps the type of its first input, and on some CPUs repacks the weight for inference.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            result: torch.Tensor = bnb.matmul_4bit(x.to(dtype), self.weight, quant_state=self.weight.quant_state)
            return result if bias is None else result + bias


def wrap(model: Any, tuning: QloraTuning, seed: int, rows: Any = None) -> Any:
    """Quantize ``model``, unless it is quantized, and add LoRA adapters drawn from ``seed`` (``lora.wrap``)."""
    quantize(model, tuning)
    loftq_starts = {n: module.__dict__.pop("loftq") for n, module in model.named_modules() if hasattr(module, "loftq")}
    # peft uses its 4-bit layers only with this flag. It is removed again, because trl would round the adapters.
    model.is_loaded_in_4bit = True
    try:
        peft_model = lora.wrap(model, tuning, seed, rows)
    finally:
        del model.is_loaded_in_4bit
    peft_model.align_quantized = True
    if tuning.init == "loftq":
        for name, layer in tuner_layers(peft_model).items():
            if name in loftq_starts:
                scale = layer.scaling["default"]
                first, second = loftq_starts[name]
                # peft multiplies B A by the scale, so it is divided out of B.
                layer.lora_A["default"].weight.data = first.clone()
                layer.lora_B["default"].weight.data = second / scale
        if tuning.dora:
            set_dora_magnitudes(peft_model)
        lora.store_initial_values(peft_model)
    return peft_model


def is_quantized(model: nn.Module) -> bool:
    """Return True for a model with a matrix in 4 bits."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


@torch.no_grad()
def quantize(model: PreTrainedModel, tuning: QloraTuning) -> None:
    """Replace the layers' linear modules with 4-bit ones, in place; a second call has no effect.

    Models that share the original tensors keep them. Raises ``UserError`` for a model without linear layers (GPT-2's
    ``Conv1D``).
    """
    if is_quantized(model):
        return
    # Output and score heads are not quantized.
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linears = [(name, linear) for name, linear in linears if id(linear) not in heads]
    if not linears:
        raise UserError(f"tuning: qlora finds no linear layer in {type(model).__name__} to keep in 4 bits; use lora.")
    for name, module in linears:
        model.set_submodule(name, _quantized(module, tuning))


def _quantized(module: torch.nn.Linear, tuning: QloraTuning) -> QuantizedLinear:
    quantized = QuantizedLinear(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compress_statistics=tuning.double_quantization,
        quant_type=tuning.quantization,
        # No memory here: the quantized weight is assigned below.
        device="meta",
    )
    quantized.weight = bnb.nn.Params4bit(
        # bitsandbytes dequantizes to the type of what it quantized.
        module.weight.data.float().contiguous(),
        requires_grad=False,
        compress_statistics=tuning.double_quantization,
        quant_type=tuning.quantization,
        module=quantized,
    ).to(module.weight.device)
    quantized.bias = module.bias
    if tuning.init == "loftq":
        # LoftQ: the adapters start as the best low-rank approximation of the quantization error.
        error = module.weight.data.float() - float_weight(quantized)
        left_vectors, sizes, right = torch.linalg.svd(error, full_matrices=False)
        # Each factor gets the root of the singular values, so both have the same scale.
        root = sizes[: tuning.rank].sqrt()
        quantized.loftq = (root[:, None] * right[: tuning.rank], left_vectors[:, : tuning.rank] * root)
    return quantized
