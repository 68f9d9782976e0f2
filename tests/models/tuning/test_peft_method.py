"""Methods of peft by name: what does not fit a model, or folds into no weights, is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.tuning import Ia3Tuning, PeftTuning
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from tests.support.models.tuning.tuning_cases import logits
from tests.support.refusals import Refused

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
         "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"type": "c3a", "options": {"block_size": 7}},
        {"type": "vera", "options": {"target_modules": ["q_prj"]}},
        {"type": "vera", "options": {"target_modules": ["lm_head"]}},
    ],
)
def test_options_that_do_not_fit_are_the_users_error(refused: Refused, options: Any, tiny_model: Path) -> None:
    refused(lambda: apply_tuning(load_policy(tiny_model), PeftTuning.model_validate(options), 0))


def test_method_that_cannot_be_merged_is_refused(refused: Refused, tiny_model: Path) -> None:
    unknown = PeftTuning.model_construct(type="lily", options={})
    refused(lambda: apply_tuning(load_policy(tiny_model), unknown, 0))


@pytest.mark.parametrize("kind", ["c3a", "fourierft"])
def test_methods_start_at_the_model_that_came_in(kind: str, tiny_model: Path) -> None:
    options = {"c3a": {"block_size": 16}, "fourierft": {"n_frequency": 50}}[kind]
    model = apply_tuning(load_policy(tiny_model), PeftTuning(type=kind, options=options), 0)
    assert logits(model.eval()).equal(logits(load_policy(tiny_model)))


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3", "olmo2", "gemma", "gpt_neox"])
def test_ia3_finds_keys_values_and_the_mlp_in_every_type(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL))
    new_model = apply_tuning(model, Ia3Tuning(), 0)
    scaled = {name.split(".ia3_l")[0].rpartition(".")[2]: tuple(p.shape)
              for name, p in new_model.named_parameters() if p.requires_grad}  # fmt: skip
    fused = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(kind)
    outputs = {fused: (96, 1)} if fused else {"k_proj": (32, 1), "v_proj": (32, 1)}
    assert scaled == {**outputs, ("dense_4h_to_h" if kind == "gpt_neox" else "down_proj"): (1, 48)}
