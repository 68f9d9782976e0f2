"""The card that is measured: its name, its matrix rate, and the most memory that a stage took from it.

    python -m benchmarks.gpu_machine cuda

prints them as JSON. A process of its own, so that the one that starts all others holds no memory of the card.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_run import memory

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "liger-kernel", "flash-attn", "bitsandbytes")
"""Packages whose versions belong to a measurement."""


def describe(device: str) -> dict[str, Any]:
    """Return the card's name, memory in bytes and matrix rate in FLOP/s, and the versions; ``absent`` if there is none.

    For ``cpu`` the name is ``cpu`` and there is no memory.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"absent": f"torch {torch.__version__} sees no CUDA device"}
    on_gpu = device == "cuda"
    return {
        "card": torch.cuda.get_device_name() if on_gpu else "cpu",
        "memory": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "matrix_rate": matrix_rate(device),
        "python": sys.version.split()[0],
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def matrix_rate(device: str, size: int | None = None) -> float:
    """Return FLOP/s of a square bf16 product, the best of ten."""
    import torch

    size = size or (8192 if device == "cuda" else 1024)
    first, second = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        first @ second
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class PeakMemory:
    """The most bytes that torch held on the GPU since this was made; on a CPU, of the process beyond its start."""

    def __init__(self, device: str) -> None:
        import torch

        self.device, self.start = device, 0
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM back
        self.start = memory("VmRSS")

    def peak(self) -> int:
        """Return the bytes of tensors."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else memory("VmHWM") - self.start

    def reserved(self) -> int | None:
        """Return the bytes that torch took from the card, fragments included; None on a CPU."""
        import torch

        return torch.cuda.max_memory_reserved() if self.device == "cuda" else None


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
