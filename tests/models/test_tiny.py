"""The two-layer model: small, deterministic, and with everything a chat model needs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.models.tiny import make_tiny

CHAT = [{"role": "user", "content": "Grüße, 日本!"}, {"role": "assistant", "content": "Yes."}]


def test_tokenizer_survives_saving_and_any_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Grüße, 日本!\n\t \x00 end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_template_ends_turns_with_eos_and_prompts_are_prefixes(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    full = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert full[: len(prompt)] == prompt
    assert full[-1] == tokenizer.eos_token_id


def test_same_seed_same_bytes_and_callers_randomness_untouched(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, reseeded = make_tiny(tmp_path / "again"), make_tiny(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (reseeded / "model.safetensors").read_bytes() != weights
    assert sum(file.stat().st_size for file in tiny_model.iterdir()) < 2_000_000


def test_both_models_load(tiny_model: Path, tiny_reward: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert policy.generation_config.eos_token_id == 2
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    reward = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert policy(ids).logits.shape == (1, 3, 260)
        assert reward(ids).logits.shape == (1, 1)
