"""Weights of a tiny model in vLLM before and after updates: ``python vllm_families.py FAMILY FOLDER``.

Run by the support matrix (``tests/support/models/matrix.py``); an engine needs its own process. ``FOLDER`` gets the
model and ``result.json``: the largest difference of a log-probability from plain transformers' on single rows, with the
engine's type, or the message of a refusal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from align.config.runtime import EngineConfig, Runtime
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.trainer_engine import ParityError, probe
from align.inference.weights import checkpoint_weights
from align.models.checkpoints.multimodal import split
from align.models.experts import has_experts
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.fork_server import start_module
from tests.support.models.families import FAMILIES, write_family
from tests.support.models.multimodal import TEXT, write_multimodal

RESULT = "result.json"
SIZES = {
    "hidden_size": 64,
    "head_dim": 32,
    "global_head_dim": 32,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 128,
    "n_embd": 64,
    "word_embed_proj_dim": 64,
    "num_heads": 8,
}
"""vLLM's attention on a CPU has no heads of 16 numbers, and its kernels need states of at least 64."""
FIELDS: dict[str, dict[str, Any]] = {
    "phi": {"intermediate_size": 256},
    "deepseek_v3": {"head_dim": 8, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32},
    "mamba2": {"num_heads": 4},
    "lfm2": {"conv_dim": 64, "block_dim": 64, "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0},
}
"""Fields that vLLM reads, with relations that published checkpoints have."""
PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(4)]


def write_model(model_type: str, folder: Path) -> Path:
    """Write a family's tiny model in sizes that vLLM accepts; of a multimodal family, the text part."""
    sizes = {name: size for name, size in SIZES.items() if name in FAMILIES[TEXT.get(model_type, model_type)]}
    fields = sizes | FIELDS.get(model_type, {})
    if model_type not in TEXT:
        return write_family(model_type, folder / "model", fields)
    write_multimodal(model_type, folder / "whole", fields)
    split(folder / "whole", folder / "model", folder / "rest")
    return folder / "model"


def differences(model_dir: Path, dtype: torch.dtype) -> list[float]:
    """Return the largest difference of each probe: at the start, after each of two updates, and after a checkpoint.

    Raises ``UserError`` if vLLM cannot run the model.
    """
    name = str(dtype).removeprefix("torch.")
    choice = EngineConfig.model_validate({"name": "vllm", "dtype": name, "cpu_kv_cache_gb": 0.1})
    runtime = Runtime(device="cpu", engine=choice)
    options: dict[str, Any] = {"precision": name, "max_length": 128, "seed": 7, "warn": print}
    # As in a stage, a model of the trainer is loaded before the engine, and another after it.
    model = load_policy(model_dir)
    engine = open_engine(model_dir, runtime, **options)
    # 1. The engine's own start, and the routes of a mixture.
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    parity = probe(engine, plain, PROMPTS)
    assert (parity.router_disagreement is not None) == has_experts(plain.config)
    assert dtype != torch.float32 or not parity.router_disagreement
    gaps = [parity.max_gap]
    # 2. Two updates: every tensor of the live model, under the names that it has in memory.
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        engine.load_weights(merged_weights(model))
        gaps.append(probe(engine, model, PROMPTS).max_gap)
    # 3. A checkpoint's tensors, under the names of its files.
    engine.load_weights(checkpoint_weights(model_dir))
    gaps.append(probe(engine, plain, PROMPTS).max_gap)
    engine.close()
    return gaps


def compared_in_vllm(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the result of a family, from a process of its own: ``dtype`` and ``differences``, or ``message``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    module = "tests.support.inference.vllm_families"
    process = start_module(module, [model_type, str(folder)], log, vllm=True, OMP_NUM_THREADS="1")
    code = process.wait(timeout=900)
    assert code == 0, log.read_text()[-4000:]
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result


def main(model_type: str, folder: Path) -> None:
    """Compare the family, and write the result. Models that float32 refuses are compared in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(model_type, folder)
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        try:
            result |= {"differences": differences(model, dtype), "dtype": str(dtype).removeprefix("torch.")}
        except UserError as error:
            result["message"] = str(error)
        except ParityError as error:
            # A stage would be refused after the first rollout. The rest of the message has numbers.
            result["message"] = str(error).split(":")[0]
        if "bfloat16 only" not in result.get("message", ""):
            break
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
