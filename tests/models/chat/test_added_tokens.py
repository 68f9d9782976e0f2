"""Special tokens added to a model, and LoRA that trains their rows: values, saving, tied and untied heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.tuning import LoraTuning
from align.models.built_in import make_tiny_tokenizer
from align.models.chat.special_tokens import add_tokens
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning, initial_policy, load_for_tuning, save_tuned
from align.models.tuning.peft_layers import merged_weights
from tests.support.refusals import Refused

NEW = ("<|call|>", "<|result|>")
IDS = torch.tensor([[5, 6, 260, 7, 261, 8]])


def untied(rows: int = 260) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=rows, head_dim=32, tie_word_embeddings=False, eos_token_id=2, pad_token_id=3, **sizes)
    )


def test_new_rows_are_the_mean_of_the_others(tiny_model: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_tokens(tokenizer, model, NEW) == [260, 261]
    weight = model.get_input_embeddings().weight
    assert weight.shape == (262, 64) and model.config.vocab_size == 262
    assert torch.equal(weight[:260], before)
    torch.testing.assert_close(weight[260:], before.mean(dim=0).expand(2, -1))
    assert model.get_output_embeddings().weight is weight
    assert tokenizer("<|call|>x", add_special_tokens=False)["input_ids"][0] == 260
    assert tokenizer.decode([260, 5], skip_special_tokens=True) == tokenizer.decode([5])


def test_an_untied_head_gets_its_own_mean_and_spare_rows_are_set() -> None:
    """A vocabulary that is padded to 320 rows has rows that nothing has trained."""
    model, tokenizer = untied(rows=320), make_tiny_tokenizer()
    expected = [
        part.weight.detach()[:260].mean(dim=0) for part in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    add_tokens(tokenizer, model, NEW)
    assert model.config.vocab_size == 320
    for part, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), expected, strict=True):
        torch.testing.assert_close(part.weight[260:262].detach(), mean.expand(2, -1))


def test_known_tokens_are_registered_and_keep_their_rows(tiny_model: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    before = copy.deepcopy(model.state_dict())
    assert add_tokens(tokenizer, model, ("<|im_start|>",)) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(params=["tied", "untied"])
def extended(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A checkpoint with two more tokens."""
    tokenizer = load_tokenizer(tiny_model)
    model = load_policy(tiny_model) if request.param == "tied" else untied()
    add_tokens(tokenizer, model, NEW)
    model.save_pretrained(tmp_path / "extended")
    tokenizer.save_pretrained(tmp_path / "extended")
    return tmp_path / "extended"


def trained(folder: Path, tuning: LoraTuning) -> object:
    model = apply_tuning(load_for_tuning(folder, tuning), tuning, seed=0)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[operator, no-any-return]


def test_lora_trains_these_rows_alone_and_they_are_saved(extended: Path, tmp_path: Path) -> None:
    tuning = LoraTuning(rank=2, train_tokens=list(NEW))
    model = trained(extended, tuning)
    weights = dict(merged_weights(model))
    start = load_policy(extended)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        part = start.get_input_embeddings() if "embed" in name else start.get_output_embeddings()
        assert torch.equal(weights[name][:260], part.weight[:260]), name
        assert not torch.allclose(weights[name][260:], part.weight[260:], atol=1e-4), name
    save_tuned(model, load_tokenizer(extended), tmp_path / "out" / "model")
    again = load_policy(tmp_path / "out" / "model")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    is_tied = start.get_output_embeddings().weight is start.get_input_embeddings().weight
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == is_tied


def test_without_its_adapters_the_model_has_its_first_rows(extended: Path) -> None:
    tuning = LoraTuning(rank=2, train_tokens=list(NEW))
    model = trained(extended, tuning)
    with initial_policy(model) as reference:
        torch.testing.assert_close(logits(reference), logits(load_policy(extended)), rtol=1e-5, atol=1e-5)
        head = model.get_base_model().get_output_embeddings()
        assert torch.equal(head.weight, load_policy(extended).get_output_embeddings().weight)
        assert head.bias is None
    pissa = trained(extended, LoraTuning(rank=2, init="pissa", train_tokens=list(NEW)))
    with initial_policy(pissa) as reference:
        torch.testing.assert_close(logits(reference), logits(load_policy(extended)), rtol=1e-4, atol=1e-4)


def test_the_saved_adapter_goes_on_its_base(extended: Path, tmp_path: Path) -> None:
    from align.models.checkpoints.conversion import attach

    model = trained(extended, LoraTuning(rank=2, train_tokens=list(NEW)))
    save_tuned(model, load_tokenizer(extended), tmp_path / "out" / "model")
    merged = attach(load_policy(extended), tmp_path / "out" / "adapter", merge=True)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_unknown_tokens_and_doubled_settings_are_refused(refused: Refused, tiny_model: Path) -> None:
    tuning = LoraTuning(train_tokens=["<|im_strat|>"])
    refused(load_for_tuning, tiny_model, tuning)
    refused(lambda: apply_tuning(load_policy(tiny_model), LoraTuning(train_tokens=["<|im_end|>"]), 0))
    refused(LoraTuning, train_tokens=["<|im_end|>"], save_modules=["embed_tokens"])


def test_a_stage_that_trains_no_tokens_keeps_its_key() -> None:
    assert "train_tokens" not in LoraTuning().model_dump()
    assert LoraTuning(train_tokens=["a"]).model_dump()["train_tokens"] == ["a"]
