"""Costs of computing: measured speeds of matrix products, and estimates of activations and passes. Torch-free.

The speeds decide what ``precision: auto`` stands for on a machine. Their measurement needs torch and is in
``align.models.compute.precision``; a plan reads them here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision, PrecisionSetting
from align.config.tuning import LowRank, TuningBase
from align.config.user_paths import cache_folder
from align.models.compute.architecture import Architecture
from align.store.fingerprint import digest
from align.store.json_files import write_text_atomically

EMULATED_BELOW = 0.67
"""bfloat16 counts as emulated if its products run at less than this share of float32's speed."""
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that restrict the instructions that torch uses, and so the speed of its products."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Processor flags of instructions for bfloat16 products; ARM's is ``bf16``."""


@dataclass(frozen=True)
class ProductSpeed:
    """Speed of matrix products on one device, in GFLOP/s."""

    bfloat16: float
    float32: float

    @property
    def faster(self) -> Precision:
        """The type with the faster products; bfloat16 if both are equal, because it needs less memory."""
        return "bfloat16" if self.bfloat16 >= self.float32 else "float32"

    @property
    def emulates_bfloat16(self) -> bool:
        """True if the device has no fast instructions for bfloat16."""
        return self.bfloat16 < EMULATED_BELOW * self.float32

    def describe(self) -> str:
        """Return both speeds: ``float32 134 GFLOP/s, bfloat16 14``."""
        faster, slower = ("bfloat16", "float32") if self.faster == "bfloat16" else ("float32", "bfloat16")
        return f"{faster} {getattr(self, faster):.0f} GFLOP/s, {slower} {getattr(self, slower):.0f}"


def processor_name() -> str:
    """Return the processor's model name with a digest of its instruction flags."""
    name = flags = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            field, _, value = line.partition(":")
            # ARM has "Features" and no model name; the first processor speaks for all.
            if field.strip() == "model name" and not name:
                name = value.strip()
            if field.strip() in ("flags", "Features") and not flags:
                flags = value.strip()
    return f"{name or platform.machine()} {digest(flags)[:8]}"


def has_bf16_flags() -> bool:
    """Return True if the processor's flags name instructions for bfloat16 products."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return any(flag in words for flag in BF16_FLAGS)


def speed_key(device_name: str | None = None) -> str:
    """Return the identity of a measurement: the device, torch's version, and restrictions of instructions.

    ``device_name`` is a GPU's name; None stands for this machine's processor.
    """
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = "none"
    parts = [device_name or processor_name(), f"torch {torch_version}"]
    if device_name is None:
        parts += [f"{name}={os.environ[name]}" for name in ISA_VARIABLES if os.environ.get(name)]
    return " | ".join(parts)


def _file() -> Path:
    return cache_folder() / "product_speed.json"


def read_speed(device_name: str | None = None) -> ProductSpeed | None:
    """Return the measured speed of a device, or None if it was never measured or the file cannot be used."""
    try:
        entry = json.loads(_file().read_text(encoding="utf-8"))[speed_key(device_name)]
        speed = ProductSpeed(float(entry["bfloat16"]), float(entry["float32"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return speed if speed.bfloat16 > 0 and speed.float32 > 0 else None


def write_speed(speed: ProductSpeed, device_name: str | None = None) -> None:
    """Keep a measured speed. A folder that cannot be written costs only another measurement."""
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = {}
    if not isinstance(entries, dict):
        entries = {}
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(_file(), json.dumps({**entries, speed_key(device_name): asdict(speed)}, indent=1))


def expected_precision(*, gpu: bool) -> Precision:
    """Return the type that ``precision: auto`` will probably stand for, without importing torch.

    On a processor that was not measured yet, its flags decide. Estimates use this; a run measures.
    """
    if gpu:
        return "bfloat16"
    speed = read_speed()
    if speed is not None:
        return speed.faster
    return "bfloat16" if has_bf16_flags() else "float32"


def resolved(setting: PrecisionSetting) -> Precision:
    """Return the type for an estimate; ``auto`` counts as bfloat16 if no device has been named yet."""
    return "bfloat16" if setting == "auto" else setting


def with_expected_precision(config: Any, *, gpu: bool) -> Any:
    """Return a stage's config with ``precision: auto`` replaced by the type that it will probably stand for."""
    if getattr(config, "precision", None) != "auto":
        return config
    return config.model_copy(update={"precision": expected_precision(gpu=gpu)})


FLOAT = 4
SHORT = 512
"""Tokens of a row up to which a CPU uses plain matrix products for attention (``fast.ragged_rows.SHORT``)."""
SIZES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


def activations_per_token(
    model: Architecture,
    tuning: TuningBase,
    precision: Precision,
    *,
    low_residual: bool = True,
    checkpointing: bool = False,
    flash: bool = False,
    offload: bool = False,
) -> int | None:
    """Return the bytes that all layers keep per token; None for a layer or a tuning without a rule.

    Without ``low_residual`` (``align.models.compute.precision``) float32 flows between the layers, and autocast casts
    it for every matrix. With ``checkpointing`` only the inputs of layers are kept, by ``offload`` in the machine's
    memory, and one layer at a time is computed again. ``flash``: ragged rows use torch's attention kernel, on a GPU or
    above ``SHORT`` tokens; it keeps keys and values once per query head.
    """
    layer = activations_of_layer(model, tuning, precision, low_residual, flash or not low_residual)
    if layer is None:
        return None
    last = _norm(model, tuning, precision, low_residual) * model.hidden
    layers = model.learning_layers(tuning)
    if not checkpointing:
        return layers * layer + last
    # Checkpointing keeps each layer's input, and the activations of the one layer that is computed again.
    flowing = SIZES[precision] if low_residual else FLOAT
    if offload:
        layers = 1
    return layers * flowing * model.hidden + layer + last


def activations_of_layer(
    model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool, flash: bool
) -> int | None:
    """Return the bytes that one layer keeps per token."""
    has_rule = tuning.trains_all or (isinstance(tuning, LowRank) and not tuning.dora)
    if model.norms is None or not has_rule or (model.largest.experts and not model.largest.routed):
        return None
    size = SIZES[precision]
    linears = model.largest.linears
    out = next(linear for linear in linears if "o_proj" in linear.path)
    down = next((linear for linear in linears if "down_proj" in linear.path), None)
    norms = _norm(model, tuning, precision, low_residual) * (model.norms * model.hidden + model.normed_heads)
    # Matrices that read the hidden states: queries, keys, values, gate and up.
    readers = sum(linear.inputs == model.hidden and linear not in (out, down) for linear in linears)
    # Then autocast casts the float32 input once for each of these matrices.
    rounded_apart = precision == "bfloat16" and not low_residual
    # Inputs of attention and of the MLP; frozen experts keep none.
    blocks = 1 if model.largest.experts and not _trains_experts(tuning) else 2
    inputs = size * (readers if rounded_apart else blocks) * model.hidden
    keys = out.inputs if flash else model.largest.token_cache // 2
    attention = size * 2 * (out.inputs + keys)  # queries and what comes out, keys and values
    gated = 0 if down is None else size * 4 * down.inputs  # gate, its activation, up, their product
    low_rank = size * tuning.rank * len(linears) if isinstance(tuning, LowRank) else 0
    return norms + inputs + attention + gated + _routed(model, tuning, precision) + low_rank


def _trains_experts(tuning: TuningBase) -> bool:
    return tuning.trains_all or (isinstance(tuning, LowRank) and "experts" in str(tuning.targets))


def _routed(model: Architecture, tuning: TuningBase, precision: Precision) -> int:
    """Return the bytes that the experts of a mixture and its router keep per token in one layer; 0 for a dense layer.

    Each of a token's experts keeps the gate, its activation, the factor, and the result that its weight multiplies.
    Experts that are trained also keep their inputs: a copy of the hidden state, and the gated product. Autocast does
    not reach their products, so all of it has the type of their weights: the base's, or float32 if they are trained.
    """
    layer = model.largest
    if not layer.experts:
        return 0
    inner = next(expert.inputs for expert in layer.experts if "down_proj" in expert.path)
    kept = 3 * inner + model.hidden
    size = SIZES[tuning.base_type(precision)]
    if _trains_experts(tuning):
        kept += inner + model.hidden
        size = FLOAT
    probabilities = 2 * FLOAT * layer.experts[0].experts  # the router's logits and their softmax
    return layer.routed * size * kept + probabilities


def passing_per_token(model: Architecture, size: int, flowing: int) -> int:
    """Return the bytes per token in a pass without gradients, at the widest part of a layer.

    ``size`` is the bytes of a product's value, ``flowing`` the bytes of a value between layers, which exists twice: as
    it comes in, and normed. In addition there are the gate, its factor and their product, or attention's inputs.
    """
    queries = next((linear.inputs for linear in model.linears if "o_proj" in linear.path), model.hidden)
    inner = max(matrix.inputs for block in model.blocks for matrix in (*block.linears, *block.experts))
    # Queries, the result, and keys and values as they are read and repeated.
    attention = 4 * queries + max(block.token_cache for block in model.blocks)
    return flowing * 2 * model.hidden + size * max(3 * inner, attention)


def _norm(model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool) -> int:
    """Return the bytes per feature that a norm keeps: its input; a norm that is not lean also its normed input."""
    lean = model.lean_norms and low_residual
    if lean and precision == "bfloat16":
        return SIZES[precision]
    return (1 + tuning.trains_all) * FLOAT
