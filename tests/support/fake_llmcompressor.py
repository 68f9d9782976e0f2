"""A stand-in for an interpreter with llm-compressor: it rounds to the nearest number.

:func:`write_interpreter` writes a program that is called as an interpreter and runs this module in its place.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

VERSION = "0.14.0"
REPOSITORY = Path(__file__).resolve().parents[2]


def write_interpreter(path: Path, changes: str = "") -> str:
    """Write the program to ``path`` and return its name; ``changes`` is a shell line that runs after a job."""
    # Called as PYTHON -I SCRIPT WORD.
    run = f"PYTHONPATH={shlex.quote(str(REPOSITORY))} {shlex.quote(sys.executable)} -m tests.support.fake_llmcompressor"
    path.write_text(f'#!/bin/sh\n{run} "$3" || exit $?\n{changes}\n')
    os.chmod(path, 0o755)
    return str(path)


def pack(numbers: Any) -> Any:
    """Return a matrix of numbers from 0 to 15 with eight of them in an int32, the first in the lowest bits."""
    words = numbers.astype(np.uint32).reshape(len(numbers), -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(words, axis=2).astype(np.uint32).view(np.int32)


def round_matrix(weight: Any, group_size: int, is_symmetric: bool) -> dict[str, Any]:
    """Return the tensors of a matrix, by their endings."""
    groups = weight.reshape(len(weight), -1, group_size)
    if is_symmetric:
        scale = np.abs(groups).max(axis=2, keepdims=True) / 7.5
        zero = np.full_like(scale, 8)
    else:
        scale = (groups.max(axis=2, keepdims=True) - groups.min(axis=2, keepdims=True)) / 15
        zero = (-groups.min(axis=2, keepdims=True) / scale).round().clip(0, 15)
    numbers = ((groups / scale).round() + zero).clip(0, 15).reshape(weight.shape)
    tensors = {"_packed": pack(numbers), "_scale": scale[:, :, 0], "_shape": np.array(weight.shape)}
    if not is_symmetric:
        tensors["_zero_point"] = np.ascontiguousarray(pack(np.ascontiguousarray(zero[:, :, 0].T)).T)
    return tensors


def main(word: str) -> None:
    """Print the version, or execute a job."""
    if word == "--version":
        sys.stdout.write(f"{VERSION}\n")
        return
    job = json.loads(Path(word).read_text())
    out = Path(job["output"])
    out.mkdir()
    tensors: dict[str, Any] = {}
    for name, weight in load_file(Path(job["model"]) / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        parts = round_matrix(weight, job["group_size"], job["is_symmetric"])
        tensors |= {f"{name}{ending}": tensor for ending, tensor in parts.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": job["is_symmetric"], "strategy": "group"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": job["group_size"]}}},
        "ignore": job["ignore"],
    }
    (out / "config.json").write_text(json.dumps({"quantization_config": quantization}))


if __name__ == "__main__":
    main(sys.argv[1])
