"""vLLM reads what a trainer without a critic saved: ``python -m tests.online.vllm_checks SAVED_MODEL``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from align.models.loading import load_policy
from align.rollouts.engine import open_engine
from align.rollouts.parity import trainer_logprobs
from align.rollouts.protocol import Sampling
from align.runtime import EngineConfig, Runtime

PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(6)]


def main(folder: Path) -> None:
    """Log-probabilities of what vLLM samples are those that transformers gives the same tokens."""
    torch.set_num_threads(1)
    model = load_policy(folder)
    runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1), threads=1)
    engine = open_engine(folder, runtime, precision="float32", max_length=128, seed=7, warn=print)
    assert engine.name == "vllm"
    found = [one for some in engine.generate(PROMPTS, Sampling(12, seed=3)) for one in some]
    ours = trainer_logprobs(model, PROMPTS, [one.token_ids for one in found], 1.0)
    theirs = torch.tensor([value for one in found for value in one.logprobs])
    gap = float((ours - theirs).abs().max())
    assert gap < 1e-3, gap
    print(f"equal within {gap:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
