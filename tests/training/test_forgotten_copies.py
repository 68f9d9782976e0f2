"""With checkpointed activations autocast keeps no copies of the matrices, whichever trainer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from align.config.runtime import Runtime
from benchmarks.stage_work import run_stage
from tests.support.peak_memory import peak_of


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_stage_s_passes_keep_copies_only_without_checkpointing(
    kind: str, checkpointing: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observations = set()
    plain = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and self.training:
            observations.add(torch.is_autocast_cache_enabled())
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    fields: dict[str, Any] = {"batch_size": 2, "micro_batch_size": 2, "max_length": 48, "eval_rows": 2, "max_steps": 1}
    if kind == "ppo":
        fields = {"updates": 1, "rollout_batch": 4, "micro_batch_size": 4, "max_prompt_tokens": 48, "max_tokens": 4}
    fields["gradient_checkpointing"] = checkpointing
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}})
    run_stage(tmp_path, kind, fields, tiny_model, 48, 4, runtime)
    expected = {not checkpointing} if kind == "sft" or checkpointing else set()  # PPO without it stays in eval mode
    assert observations == expected


@pytest.mark.parametrize("cached", [True, False])
def test_what_the_copies_take(cached: bool) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, use_cache=False)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    ids = torch.randint(0, 64, (1, 16))

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            model(ids, labels=ids)

    assert peak_of(forward) > 2 * matrices if cached else peak_of(forward) < matrices
