"""QLoRA (arXiv 2305.14314): adapters beside matrices kept in 4 bits by bitsandbytes, on GPUs and CPUs.

The matrices of the layers are quantized; embeddings, norms and heads stay as they are. LoftQ (arXiv 2310.08659) is done
here with one round of quantization and decomposition, because peft's own needs a GPU. Left out: 8 bits, other
libraries, and models that come quantized.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from align.config.tuning import QloraTuning
from align.errors import UserError
from align.models.tuning import lora

try:
    bnb: Any = importlib.import_module("bitsandbytes")
except ModuleNotFoundError:
    raise UserError(
        "tuning: qlora needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or take `method: lora`."
    ) from None


class QuantizedLinear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A linear layer in 4 bits that computes in the type autocast asks for, as a plain one does.

    bitsandbytes' own keeps the type of its first input for ever, and on some CPUs packs the weight anew for inference.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            result: torch.Tensor = bnb.matmul_4bit(x.to(dtype), self.weight, quant_state=self.weight.quant_state)
            return result if bias is None else result + bias


def wrap(model: Any, tuning: QloraTuning, seed: int, rows: Any = None) -> Any:
    """``model`` quantized, unless it is, with LoRA adapters drawn from ``seed``; see ``lora.wrap``."""
    quantize(model, tuning)
    starts = {n: module.__dict__.pop("loftq") for n, module in model.named_modules() if hasattr(module, "loftq")}
    model.is_loaded_in_4bit = True  # peft looks for its 4-bit layers only then; trl would round the adapters
    try:
        made = lora.wrap(model, tuning, seed, rows)
    finally:
        del model.is_loaded_in_4bit
    made.align_quantized = True
    if tuning.init == "loftq":
        from align.models.tuning.folding import tuner_layers

        for name, layer in tuner_layers(made).items():
            if name in starts:
                scale = layer.scaling["default"]
                first, second = starts[name]
                layer.lora_A["default"].weight.data = first.clone()
                layer.lora_B["default"].weight.data = second / scale
        if tuning.dora:
            _measure_lengths(made)
        lora.keep_start(made)
    return made


def is_quantized(model: Any) -> bool:
    """Whether any of its matrices is in 4 bits."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


@torch.no_grad()
def quantize(model: Any, tuning: QloraTuning) -> None:
    """Put 4-bit matrices in the place of the layers' linear ones, in ``model`` itself; a second call changes nothing.

    The tensors that were there stay as they are for whoever shares them. Raises ``UserError`` for a model without
    linear layers (GPT-2's ``Conv1D``).
    """
    if is_quantized(model):
        return
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in heads
    ]
    if not found:
        raise UserError(f"tuning: qlora finds no linear layer in {type(model).__name__} to keep in 4 bits; take lora.")
    for name, module in found:
        model.set_submodule(name, _quantized(module, tuning))


def _quantized(module: torch.nn.Linear, tuning: QloraTuning) -> QuantizedLinear:
    made = QuantizedLinear(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compress_statistics=tuning.double_quantization,
        quant_type=tuning.quantization,
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(
        module.weight.data.contiguous(),
        requires_grad=False,
        compress_statistics=tuning.double_quantization,
        quant_type=tuning.quantization,
        module=made,
    ).to(module.weight.device)
    made.bias = module.bias
    if tuning.init == "loftq":
        lost = module.weight.data.float() - dequantized(made)
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        root = sizes[: tuning.rank].sqrt()
        made.loftq = (root[:, None] * right[: tuning.rank], left[:, : tuning.rank] * root)
    return made


def dequantized(module: Any) -> torch.Tensor:
    """The matrix of a quantized linear layer, (out, in) in float32."""
    weight: torch.Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.float()


def _measure_lengths(made: Any) -> None:
    """DoRA's row lengths were taken before LoftQ's start was there; take them of the model as it now is."""
    for layer in made.modules():
        if getattr(layer, "lora_magnitude_vector", None) and "default" in layer.lora_magnitude_vector:
            update = layer.get_delta_weight("default")
            lengths = (dequantized(layer.get_base_layer()) + update).norm(dim=1)
            layer.lora_magnitude_vector["default"].weight.data = lengths.to(update.dtype)
