"""A whole multimodal checkpoint with a changed text part in vLLM, on text: ``python vllm_multimodal.py KIND FOLDER``.

Run by ``tests/models/checkpoints/test_multimodal.py``; an engine needs its own process.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from align.inference.trainer_engine import trainer_logprobs
from align.inference.vllm import why_unusable
from align.models.checkpoints.multimodal import join, split
from tests.support.inference.vllm_families import PROMPTS, SIZES
from tests.support.models.families import FAMILIES
from tests.support.models.multimodal import TEXT, write_multimodal

TYPES = {"qwen3_5": ("bfloat16", 0.05)}
"""Types of the computation, and the largest difference in nats: vLLM computes layers with a state in bfloat16 only."""


def write_changed(kind: str, folder: Path) -> Path:
    """Write a checkpoint, change all weights of its text part, and put that back."""
    sizes = {name: size for name, size in SIZES.items() if name in FAMILIES[TEXT[kind]]}
    whole = write_multimodal(kind, folder / "whole", sizes)
    split(whole, folder / "text", folder / "rest")
    model = AutoModelForCausalLM.from_pretrained(folder / "text")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "joined")
    for file in (folder / "text").glob("tok*"):
        shutil.copy(file, folder / "joined")
    join(folder / "rest", folder / "joined")
    return folder / "joined"


def main(kind: str, folder: Path) -> None:
    """Compare vLLM's log-probabilities of sampled tokens with those of the whole model in transformers."""
    joined = write_changed(kind, folder)
    # vLLM registers configs in place of transformers', so the model is loaded first.
    model = AutoModelForImageTextToText.from_pretrained(joined, dtype=torch.float32)
    assert why_unusable() is None
    from vllm import LLM, SamplingParams

    dtype, limit = TYPES.get(kind, ("float32", 1e-5))
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 10**8,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 4096,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
    }
    llm = LLM(model=str(joined), seed=1, **options)
    params = SamplingParams(max_tokens=16, seed=3, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = [
        output.outputs[0]
        for output in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    ]
    responses = [list(output.token_ids) for output in outputs]
    sampled = [
        entry[token].logprob
        for ids, output in zip(responses, outputs, strict=True)
        for token, entry in zip(ids, output.logprobs, strict=True)
    ]
    expected = trainer_logprobs(model, PROMPTS, responses, 1.0)
    gap = float((torch.tensor(sampled) - expected).abs().max())
    assert gap < limit, gap
    print(f"all checks passed: {gap:.2g} nats")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
