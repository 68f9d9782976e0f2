"""Measure the speed of matrix products in bfloat16 and float32, which decides what ``precision: auto`` stands for.

Flags of a processor would be a guess: some emulate bfloat16, some restrict instructions by a variable, and GPUs differ.
Two products of a model's size take about 50 ms, once per machine and version of torch.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from align.config.base import Precision, PrecisionSetting
from align.models.compute_types import ProductSpeed, read_speed, write_speed

CPU_SHAPE = (128, 1024, 1024)
"""Rows, inputs and outputs of the product on a processor; float32 takes 2 ms on two cores, emulated bfloat16 30."""
GPU_SHAPE = (4096, 4096, 4096)
"""A product that keeps a GPU busy: in a smaller one both types take the time of the launch."""
TYPE_SECONDS = 0.02
"""Measuring a type ends after this many seconds, but not before one product after the warm-up."""


def product_speed(device: torch.device) -> ProductSpeed:
    """Return the speed of products on ``device``, measured now if it was not measured on this machine before."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    speed = read_speed(name)
    if speed is None:
        speed = measure(device)
        write_speed(speed, name)
    return speed


def measure(device: torch.device) -> ProductSpeed:
    """Measure products on ``device`` with torch's current threads."""
    return ProductSpeed(_speed_in(torch.bfloat16, device), _speed_in(torch.float32, device))


def resolve_precision(setting: PrecisionSetting, device: torch.device) -> Precision:
    """Return the type that ``setting`` stands for on ``device``."""
    return product_speed(device).faster if setting == "auto" else setting


def _speed_in(dtype: torch.dtype, device: torch.device) -> float:
    """Return the GFLOP/s of the fastest of several products."""
    rows, inputs, outputs = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    left = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    _seconds(left, weight)  # the first product also prepares kernels
    best = spent = _seconds(left, weight)
    while spent < TYPE_SECONDS:
        seconds = _seconds(left, weight)
        best = min(best, seconds)
        spent += seconds
    return 2 * rows * inputs * outputs / best / 1e9


def _seconds(left: torch.Tensor, weight: torch.Tensor) -> float:
    _synchronize(left.device)
    start = time.perf_counter()
    torch.nn.functional.linear(left, weight)
    _synchronize(left.device)
    return max(time.perf_counter() - start, 1e-9)


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
