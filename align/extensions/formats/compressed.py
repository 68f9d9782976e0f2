"""Export in compressed-tensors' formats that need no calibration: FP8 and W8A8, for vLLM.

Weights of linear layers are rounded with one scale per output channel. Activations are rounded while the model runs,
with one scale per token, so no data are needed. Embeddings, norms, biases and the output head keep the checkpoint's
type. FP8 is float8 e4m3 for both; W8A8 is int8 for both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.errors import StageFailed, UserError
from align.export.export import FLOAT8_LARGEST, INT8_LARGEST, Source
from align.store.json_files import write_atomically

CompressedFormat = Literal["fp8", "w8a8"]
COMPRESSED_FORMATS: tuple[CompressedFormat, ...] = ("fp8", "w8a8")
SCALE = "_scale"
"""Ending of the name of a weight's scales."""


@dataclass(frozen=True)
class Scheme:
    """A format's numbers."""

    layout: str
    """compressed-tensors' name of the format."""
    type: Literal["int", "float"]
    largest: float
    """Largest number of the type, which stands for the largest weight of a channel."""
    activations: Literal["int8", "float8"]


SCHEMES: dict[CompressedFormat, Scheme] = {
    "fp8": Scheme("float-quantized", "float", FLOAT8_LARGEST, "float8"),
    "w8a8": Scheme("int-quantized", "int", INT8_LARGEST, "int8"),
}


def check_compressed_source(source: Source, name: str) -> None:
    """Raise ``UserError`` for a checkpoint that a format cannot hold, before its weights are read."""
    from align.models.pretrained import open_config

    if source.is_reward():
        raise UserError(f"{source.folder}: --format {name} is for models that answer, and this is a reward model.")
    config = open_config(source.folder).get_text_config()
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, field, None):
            raise UserError(
                f"{source.folder}: --format {name} does not support mixtures of experts ({field} "
                f"{getattr(config, field)}): their matrices were not verified in vLLM. Use --format transformers."
            )


def write_compressed(plain: Path, out: Path, name: CompressedFormat) -> int:
    """Write a transformers folder in a format to a new folder ``out``; return the number of rounded matrices.

    Raises ``UserError`` for a model without linear layers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    scheme = SCHEMES[name]
    matrices = linear_weights(plain)
    if not matrices:
        raise UserError(f"{plain}: has no linear layers to round. Use --format transformers.")
    out.mkdir(parents=True)
    index: dict[str, str] = {}
    size = 0
    for file in sorted(plain.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copyfile(file, out / file.name)
            continue
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in load_file(file).items():
            if key not in matrices:
                tensors[key] = tensor
                continue
            tensors[key], tensors[key + SCALE] = round_weight(tensor, scheme)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_index(out, index, size)
    _write_config(out, scheme)
    return len(matrices)


def linear_weights(folder: Path) -> set[str]:
    """Return the names of the weights of a model's linear layers, without its output head."""
    import torch

    from align.models.pretrained import empty_model

    model = empty_model(folder)
    head = model.get_output_embeddings()
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            names.add(f"{name}.weight")
    return names


def round_weight(weight: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Return a matrix in the format's type, and its scales, (rows, 1) in float32."""
    import torch

    values = weight.float()
    scale = (values.abs().amax(dim=1, keepdim=True) / scheme.largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = values / scale
    if scheme.type == "int":
        return scaled.round().clamp(-127, 127).to(torch.int8), scale
    return scaled.clamp(-scheme.largest, scheme.largest).to(torch.float8_e4m3fn), scale


def read_compressed(plain: Path, folder: Path, out: Path, name: CompressedFormat) -> None:
    """Compare a written folder with the weights that it was written from; write a transformers folder with its weights.

    Raises ``StageFailed`` for an error beyond the format's rounding.
    """
    from safetensors.torch import load_file, save_file

    scheme = SCHEMES[name]
    out.mkdir(parents=True)
    for file in sorted(plain.iterdir()):
        if not file.is_file():
            continue
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        expected = load_file(file)
        written = load_file(folder / file.name)
        values = {}
        for key, weight in expected.items():
            values[key] = _read_weight(key, weight, written, scheme)
        save_file(values, out / file.name, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_atomically(out / "config.json", config | {"dtype": "float32"})


def _read_weight(name: str, weight: Any, written: Mapping[str, Any], scheme: Scheme) -> Any:
    """Return a weight of a written folder in float32, compared with the weight that it was written from."""
    scale = written.get(name + SCALE)
    values = written[name].float()
    if scale is None:
        bound = values * 0
    elif scheme.type == "int":
        values = values * scale
        # The quotient and the product are rounded in float32, which shows if a weight is midway between two steps.
        bound = scale * 0.5 + values.abs() * 2.0**-22
    else:
        values = values * scale
        # e4m3 has three binary digits behind the point, and steps of 2^-9 near zero.
        bound = weight.float().abs() * 2.0**-4 + scale * 2.0**-10
    error = (values - weight.float()).abs()
    # The last factor is the rounding of float32 in these products.
    if not bool((error <= bound * (1 + 1e-5)).all()):
        raise StageFailed(f"{name} differs by up to {float(error.max()):.3g}, more than {scheme.layout} rounds.")
    return values


def _write_index(out: Path, index: dict[str, str], size: int) -> None:
    """Write the index of several files of weights; a model in a single file has none."""
    file = out / "model.safetensors.index.json"
    if file.is_file():
        write_atomically(file, {"metadata": {"total_size": size}, "weight_map": index})


def _write_config(out: Path, scheme: Scheme) -> None:
    """Add the format to config.json, as compressed-tensors and vLLM read it."""
    common = {"num_bits": 8, "type": scheme.type, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": scheme.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write_atomically(out / "config.json", config)
