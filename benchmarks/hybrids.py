"""CPU time of a training pass of hybrids, padded and on real tokens: ``python -m benchmarks.hybrids`` (docs/models.md).

Eight rows of 60 to 400 tokens go through small trunks with random weights, in one thread; prefixes are shared or not.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from align.models.fast.real_tokens import compute_real_tokens, remove_hooks
from tests.support.models.families import FAMILIES, family_model

LENGTHS = [400, 60, 90, 120, 200, 50, 75, 100]
TRUNK = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LINEAR = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**TRUNK, **LINEAR, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "lfm2": {**TRUNK, "layer_types": ["conv", "conv", "full_attention", "conv"]},
}
REPEATS = 2


def pass_seconds(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the CPU time of the fastest of ``REPEATS`` forward and backward passes, after a first one."""
    seconds = []
    for _ in range(REPEATS + 1):
        model.zero_grad()
        started = time.process_time()
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        (states * mask[..., None]).sum().backward()
        seconds.append(time.process_time() - started)
    return min(seconds[1:])


def main() -> None:
    """Print a line per model and shared prefix."""
    torch.set_num_threads(1)
    mask = torch.tensor([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
    for model_type, fields in MODELS.items():
        FAMILIES[model_type] = {**FAMILIES[model_type], **fields}
        model = family_model(model_type)
        for prefix in (0, 40):
            ids = torch.randint(10, 250, mask.shape, generator=torch.Generator().manual_seed(0))
            ids[:, :prefix] = ids[0, :prefix]
            padded = pass_seconds(model, ids, mask)
            assert compute_real_tokens(model)
            real = pass_seconds(model, ids, mask)
            remove_hooks(model.base_model)
            sys.stdout.write(f"{model_type}, {prefix} tokens shared: padded {padded:.2f} s, real tokens {real:.2f} s\n")


if __name__ == "__main__":
    main()
