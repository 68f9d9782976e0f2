"""Loading and saving checkpoints: merged LoRA equals the live model, heads are never re-initialized silently."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from align.config.tuning import FullTuning, LoraTuning
from align.models.loading import load_policy, load_reward, load_tokenizer, new_reward
from align.models.tuning.apply import apply_tuning, save_tuned
from align.models.tuning.peft_layers import merged_weights
from tests.support.refusals import Refused

IDS = torch.tensor([[1, 40, 41, 42, 2]])


def _nudge(model: torch.nn.Module) -> None:
    """Stand-in for training: LoRA's B starts at zero, so every trainable weight gets a deterministic push."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def test_saved_lora_policy_answers_as_the_live_one(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4), seed=0)
    _nudge(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        live, base = model(IDS).logits, load_policy(tiny_model)(IDS).logits
    save_tuned(model, tokenizer, tmp_path / "model")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    saved = load_policy(tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(saved(IDS).logits, live, atol=1e-5)
    assert not torch.allclose(live, base, atol=1e-2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "model").glob("*.bin"))
    assert load_tokenizer(tmp_path / "model").chat_template == tokenizer.chat_template
    assert saved.generation_config.eos_token_id == tokenizer.eos_token_id


def test_merged_weights_have_the_plain_names_and_the_tied_head(tiny_model: Path) -> None:
    plain = load_policy(tiny_model)
    names = {name for name, _ in merged_weights(plain)}
    assert "lm_head.weight" in names
    adapted = apply_tuning(load_policy(tiny_model), LoraTuning(rank=2), seed=0)
    assert {name for name, _ in merged_weights(adapted)} == names
    # at the start LoRA adds nothing, so every weight is the base's
    for name, tensor in merged_weights(adapted):
        assert torch.equal(tensor, plain.state_dict()[name])


def test_a_new_head_is_zero_and_draws_nothing(tiny_model: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = new_reward(tiny_model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.score.weight.any() and model.score.bias is None
    with torch.no_grad():
        assert not model(IDS).logits.any()


def test_reward_needs_a_head_and_survives_saving(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(load_reward, tiny_model)
    model = apply_tuning(new_reward(tiny_model), LoraTuning(rank=4), seed=0)
    _nudge(model)
    with torch.no_grad():
        live = model(IDS).logits
    save_tuned(model, load_tokenizer(tiny_model), tmp_path / "model")
    assert "score.weight" in load_file(tmp_path / "model" / "model.safetensors")
    with torch.no_grad():
        assert torch.allclose(load_reward(tmp_path / "model")(IDS).logits, live, atol=1e-5)


def test_full_tuning_adds_no_adapter_and_seeds_repeat_one(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    assert apply_tuning(model, FullTuning(), seed=0) is model
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (apply_tuning(load_policy(tiny_model), LoraTuning(rank=2), seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_unknown_lora_target_is_the_users_error(refused: Refused, tiny_model: Path) -> None:
    refused(lambda: apply_tuning(load_policy(tiny_model), LoraTuning(targets=["no_such"]), seed=0))


def test_tokenizer_that_pads_with_eos_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    refused(load_tokenizer, tmp_path)
