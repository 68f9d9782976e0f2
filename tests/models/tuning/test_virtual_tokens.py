"""Virtual tokens: in the vocabulary and the template, folded exactly, what peft makes of them, and switched off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.tuning import LoraTuning, PrefixTuning, PromptTuning, PTuning
from align.models.chat.render import render_conversation, render_prompt
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.tuning.apply import apply_tuning, initial_policy, load_for_tuning, save_tuned
from align.models.tuning.virtual_tokens import virtual_mass
from tests.support.models.tuning.confident_model import confident_copy, tuned
from tests.support.refusals import Refused

TALK = [{"role": "user", "content": "hello you"}]
METHODS = {
    "prompt": PromptTuning(tokens=5),
    "mlp": PTuning(tokens=5, hidden_size=16),
    "lstm": PTuning(tokens=5, encoder="lstm", hidden_size=16),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return confident_copy(tiny_model, tmp_path_factory.mktemp("confident") / "base")


def rows_of(*texts: str, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask (B, T) of prompts."""
    rows = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def test_every_conversation_begins_with_them(base: Path) -> None:
    plain, extended = load_tokenizer(base), load_tokenizer(base, PromptTuning(tokens=3))
    new = list(range(len(plain), len(plain) + 3))
    answered = [*TALK, {"role": "assistant", "content": "hi"}]
    assert render_prompt(extended, TALK) == new + render_prompt(plain, TALK)
    assert render_conversation(extended, answered) == new + render_conversation(plain, answered)
    assert extended.decode(new, skip_special_tokens=True) == ""
    assert load_tokenizer(base, LoraTuning()).get_vocab() == plain.get_vocab()


@pytest.mark.parametrize("method", METHODS)
def test_saved_as_a_plain_checkpoint_with_the_very_logits(method: str, base: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(base, METHODS[method])
    save_tuned(model, tokenizer, tmp_path / "model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids, mask = rows_of("hello", "a longer one", tokenizer=again)
    with torch.no_grad():
        expected, actual = (entry(input_ids=ids, attention_mask=mask).logits for entry in (model, loaded))
        before = load_policy(base)(ids[:1, 5:]).logits
    assert torch.equal(expected, actual)
    assert (actual[:1, 5:, : before.shape[-1]] - before).abs().max() > 1  # they do change what is said
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight[-5:].abs().max() == 0
    assert torch.equal(loaded.lm_head.weight[:-5], load_policy(base).lm_head.weight)
    assert model.config.tie_word_embeddings  # the live model is as it was
    save_tuned(model, tokenizer, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_the_adapter_and_says_the_same(method: str, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokenizer = tuned(base, METHODS[method])
    save_tuned(model, tokenizer, tmp_path / "model")
    theirs = PeftModel.from_pretrained(load_policy(base), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([render_prompt(tokenizer, TALK)])
    with torch.no_grad():
        ours = model(ids).logits[:, 5:]
        actual = theirs(input_ids=ids[:, 5:], attention_mask=torch.ones_like(ids[:, 5:])).logits[:, 5:]
    assert torch.allclose(ours[..., : actual.shape[-1]], actual, atol=1e-4)


def test_switched_off_they_are_not_seen(base: Path) -> None:
    for tuning in (METHODS["prompt"], PrefixTuning(tokens=5)):
        model, tokenizer = tuned(base, tuning)
        ids, mask = rows_of("hello", "a longer one", "x", tokenizer=tokenizer)
        with torch.no_grad(), initial_policy(model):
            off = model(input_ids=ids, attention_mask=mask).logits
        with torch.no_grad():
            plain = load_policy(base)(input_ids=ids[:, 5:], attention_mask=mask[:, 5:]).logits
            on = model(input_ids=ids, attention_mask=mask).logits
        real = mask[:, 5:].bool()
        assert torch.allclose(off[:, 5:, : plain.shape[-1]][real], plain[real], atol=1e-3)
        assert (on - off).abs()[:, 5:][real].max() > 1


def test_loaded_for_tuning_a_model_says_what_it_said(base: Path) -> None:
    tuning = METHODS["prompt"]
    tokenizer, model = load_tokenizer(base, tuning), load_for_tuning(base, tuning)
    ids = torch.tensor([render_prompt(tokenizer, TALK)])
    with torch.no_grad():
        plain = load_policy(base)(ids[:, 5:]).logits
        assert torch.allclose(model(ids).logits[:, 5:, : plain.shape[-1]], plain, atol=1e-3)


def test_a_text_to_start_from_is_that_text_as_a_prompt(base: Path) -> None:
    text = "say it in French: "
    for tuning in (PromptTuning(tokens=len(text), text=text), PrefixTuning(tokens=len(text), text=text)):
        tokenizer = load_tokenizer(base, tuning)
        model = apply_tuning(load_for_tuning(base, tuning), tuning, 3, tokenizer=tokenizer)
        ids = torch.tensor([render_prompt(tokenizer, TALK)])
        written = torch.cat([torch.tensor([tokenizer(text)["input_ids"]]), ids[:, len(text) :]], dim=1)
        with torch.no_grad():
            expected, actual = load_policy(base)(written).logits[:, len(text) :], model(ids).logits[:, len(text) :]
        assert torch.allclose(expected, actual[..., : expected.shape[-1]], atol=1e-3)


def test_seeds_decide_and_the_callers_randomness_stays(base: Path) -> None:
    def made(seed: int) -> torch.Tensor:
        tuning = PromptTuning(tokens=5)
        tokenizer = load_tokenizer(base, tuning)
        model = apply_tuning(load_for_tuning(base, tuning), tuning, seed, tokenizer=tokenizer)
        rows: torch.Tensor = model.get_input_embeddings().virtual.rows
        return rows

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, reseeded = made(1), made(1), made(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, reseeded)


def test_tuned_twice_the_new_tokens_stand_in_front(base: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(base, PromptTuning(tokens=2))
    save_tuned(model, tokenizer, tmp_path / "once" / "model")
    again, extended = tuned(tmp_path / "once" / "model", PromptTuning(tokens=3))
    save_tuned(again, extended, tmp_path / "twice" / "model")
    plain = render_prompt(load_tokenizer(base), TALK)
    prompt = render_prompt(load_tokenizer(tmp_path / "twice" / "model"), TALK)
    assert prompt == [262, 263, 264, 260, 261, *plain]
    with torch.no_grad():
        ids = torch.tensor([prompt])
        assert torch.equal(load_policy(tmp_path / "twice" / "model")(ids).logits, again(ids).logits)


def test_a_reward_model_scores_as_it_did(base: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(base, METHODS["prompt"], reward=True)
    save_tuned(model, tokenizer, tmp_path / "model")
    ids, mask = rows_of("hello", "a longer one", tokenizer=load_tokenizer(tmp_path / "model"))
    with torch.no_grad():
        expected, actual = (
            entry(input_ids=ids, attention_mask=mask).logits for entry in (model, load_reward(tmp_path / "model"))
        )
    assert torch.equal(expected, actual)
    assert expected.abs().min() > 0


def test_only_they_are_trained(base: Path) -> None:
    model, _ = tuned(base, METHODS["prompt"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"model.embed_tokens.virtual.rows"}
    reward, _ = tuned(base, METHODS["prompt"], reward=True)
    assert {n for n, p in reward.named_parameters() if p.requires_grad} == {
        "model.embed_tokens.virtual.rows",
        "score.weight",
    }


def test_model_that_samples_virtual_tokens_is_refused(refused: Refused, tiny_model: Path, base: Path) -> None:
    refused(lambda: tuned(tiny_model, METHODS["prompt"]))
    model, tokenizer = tuned(base, METHODS["prompt"])
    ids = list(range(260, 265))
    assert 0 < virtual_mass(model, tokenizer, ids) < 1e-3
    with torch.no_grad():
        model.model.norm.weight /= 8
    assert virtual_mass(model, tokenizer, ids) > 1e-3
    refused(lambda: save_tuned(model, tokenizer, Path("/nonexistent")))


def test_a_stage_without_their_tokenizer_is_refused(refused: Refused, base: Path) -> None:
    for tuning in (METHODS["prompt"], PrefixTuning(tokens=5)):
        model = load_for_tuning(base, tuning)
        refused(apply_tuning, model, tuning, 1, tokenizer=load_tokenizer(base))


def test_tokenizer_that_splits_text_differently_is_refused(refused: Refused, base: Path, tmp_path: Path) -> None:
    folder = confident_copy(base, tmp_path / "metaspace")
    file = folder / "tokenizer.json"
    # marks the beginning of a text, and of nothing that stands behind a special token
    mark = {"type": "Metaspace", "replacement": "!", "prepend_scheme": "first", "split": False}
    parsed = json.loads(file.read_text(encoding="utf-8")) | {"pre_tokenizer": mark}
    file.write_text(json.dumps(parsed), encoding="utf-8")
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", encoding="utf-8")
    refused(lambda: load_tokenizer(folder, METHODS["prompt"]))


def test_an_embedding_that_scales_is_refused(refused: Refused, base: Path) -> None:
    class Scaled(torch.nn.Embedding):
        pass

    model = load_policy(base)
    model.get_input_embeddings().__class__ = Scaled
    from align.models.tuning.virtual_tokens import add_embedding_rows

    refused(add_embedding_rows, model, [260, 261])


def test_positions_that_are_learned_are_those_of_the_text(base: Path, tmp_path: Path) -> None:
    """GPT-2 adds a vector for each place: switched off, the tokens must not count as places either."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.5)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 3, 1, 2
    sure = GPT2LMHeadModel(config)
    sure.transformer.ln_f.weight.data *= 8
    sure.save_pretrained(tmp_path / "gpt2")
    load_tokenizer(base).save_pretrained(tmp_path / "gpt2")
    model, tokenizer = tuned(tmp_path / "gpt2", METHODS["prompt"])
    ids, mask = rows_of("hello", "a longer one", tokenizer=tokenizer)
    with torch.no_grad():
        with initial_policy(model):
            off = model(input_ids=ids, attention_mask=mask).logits[:, 5:, :260]
        plain = load_policy(tmp_path / "gpt2")(input_ids=ids[:, 5:], attention_mask=mask[:, 5:]).logits
        on = model(input_ids=ids, attention_mask=mask).logits
    real = mask[:, 5:].bool()
    assert torch.allclose(off[real], plain[real], atol=1e-3)
    save_tuned(model, tokenizer, tmp_path / "model")
    with torch.no_grad():
        logits = load_policy(tmp_path / "model")(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(on, logits, atol=1e-5)
