"""Measured speeds of matrix products, which decide what ``precision: auto`` stands for on a machine.

The measurement itself needs torch and is in ``align.models.compute.precision``. This file needs none, so a plan
can say which type a run would use here.
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
from align.config.user_paths import cache_folder
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
