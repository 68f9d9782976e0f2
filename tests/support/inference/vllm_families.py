"""Weights of a mixture or a hybrid in vLLM before and after an update: ``python vllm_families.py FAMILY FOLDER``.

Run by ``test_vllm.py``; an engine needs its own process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from align.config.runtime import EngineConfig
from align.inference.trainer_engine import probe
from align.inference.vllm import VllmEngine
from align.inference.weights import checkpoint_weights
from align.models.experts import has_experts
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import FAMILIES, write_family

SIZES = {"hidden_size": 64, "head_dim": 32}
"""vLLM's attention on a CPU has no heads of 16 numbers, and its kernels need states of at least 64."""
LFM2 = {"conv_dim": 64, "block_dim": 64, "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0}
"""Fields that vLLM reads, and that published checkpoints have."""
PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(4)]


def main(model_type: str, folder: Path) -> None:
    fields = {**FAMILIES[model_type], **SIZES}
    states = {"mamba_n_heads": 8, "mamba_d_ssm": 128}
    FAMILIES[model_type] = fields | {name: value for name, value in states.items() if name in fields}
    if model_type == "lfm2":
        FAMILIES[model_type] |= LFM2
    write_family(model_type, folder)
    config = EngineConfig(name="vllm", cpu_kv_cache_gb=0.1)
    engine = VllmEngine(folder, device=torch.device("cpu"), dtype=torch.float32, config=config, max_length=128, seed=7)
    model = load_policy(folder)
    # 1. The engine's own start, and the routes of a mixture.
    parity = probe(engine, model, PROMPTS)
    assert parity.max_gap < 1e-5, parity
    assert parity.router_disagreement == (0.0 if has_experts(model.config) else None)
    # 2. Two updates: every tensor of the live model, under the names that it has in memory.
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        engine.load_weights(merged_weights(model))
        parity = probe(engine, model, PROMPTS)
        assert parity.max_gap < 1e-4, parity
    # 3. A checkpoint's tensors, under the names of its files.
    engine.load_weights(checkpoint_weights(folder))
    parity = probe(engine, load_policy(folder), PROMPTS)
    assert parity.max_gap < 1e-5, parity
    engine.close()
    print("all checks passed")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
