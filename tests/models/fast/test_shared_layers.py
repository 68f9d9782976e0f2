"""Lower layers passed apart give what the whole decoder gives, for every type that is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.tuning import LoraTuning
from align.models.fast import shared_parts as shared_layers
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from align.rl.model import trunk_of

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


MIXED = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
WINDOWS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"use_sliding_window": True, "sliding_window": 3},
    "upper_half": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "mixed": {"use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED},
}


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        *((model_type, "plain") for model_type in shared_layers.SPLITTABLE),
        *((model_type, "window") for model_type in ("mistral", "phi3", "smollm3")),
        *((model_type, "upper_half") for model_type in ("qwen2", "qwen3")),
        *((model_type, "mixed") for model_type in ("qwen2", "qwen3", "smollm3")),
    ],
)
def test_in_two_parts_as_in_one(model_type: str, windows: str, count: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **WINDOWS[windows])
    trunk = AutoModelForCausalLM.from_config(config).eval().model
    with torch.no_grad():
        full = trunk(input_ids=IDS, use_cache=False).last_hidden_state
        with shared_layers.run_lower_layers(trunk, count):
            states = trunk(input_ids=IDS, use_cache=False).last_hidden_state
        with shared_layers.run_upper_layers(trunk, count):
            last_hidden_state = trunk(inputs_embeds=states, use_cache=False).last_hidden_state
    assert last_hidden_state.equal(full)
    assert not states.equal(full)
    assert len(trunk.layers) == 5


@pytest.mark.parametrize(("model_type", "windows"), [("qwen2", "mixed"), ("qwen3", "mixed"), ("mistral", "window")])
def test_the_windows_of_these_models_count(model_type: str, windows: str) -> None:
    """Or the test above would hold whatever mask a layer is given."""
    actual = []
    for fields in (WINDOWS[windows], {"sliding_window": None}):
        torch.manual_seed(0)
        trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **fields)).eval().model
        with torch.no_grad():
            actual.append(trunk(input_ids=IDS, use_cache=False).last_hidden_state)
    assert (actual[0] - actual[1]).abs().max() > 0.1


def test_layers_below_the_first_adapter_are_frozen(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    assert shared_layers.count_frozen_layers(trunk_of(model)) == 0
    assert shared_layers.count_frozen_layers(trunk_of(apply_tuning(model, LoraTuning(last_layers=1), 0))) == 1
    everywhere = apply_tuning(load_policy(tiny_model), LoraTuning(), 0)
    assert shared_layers.count_frozen_layers(trunk_of(everywhere)) == 0
    embedded = LoraTuning(last_layers=1, save_modules=["embed_tokens"])
    assert shared_layers.count_frozen_layers(trunk_of(apply_tuning(load_policy(tiny_model), embedded, 0))) == 0


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gemma3_text"])
def test_another_kind_of_decoder_is_passed_whole(model_type: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99} if model_type == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).requires_grad_(False)
    assert shared_layers.count_frozen_layers(getattr(model, model.base_model_prefix)) == 0


def test_the_stack_is_whole_again_after_an_error(tiny_model: Path) -> None:
    trunk = trunk_of(load_policy(tiny_model))
    layers, norm = trunk.layers, trunk.norm
    with pytest.raises(ZeroDivisionError), shared_layers.run_lower_layers(trunk, 1):
        1 / 0  # noqa: B018
    assert trunk.layers is layers
    assert trunk.norm is norm
