"""Right-padded batches on their real tokens: states and gradients of rows alone, and which calls are left alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from align.models.fast.real_tokens import compute_real_tokens, computes_real_tokens, remove_hooks

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT = list(range(1, 13))
PAIR = [[*PROMPT, 20, 21, 22], [*PROMPT, 30, 31]]


def make_model(config: Any = None, kind: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL, **HEADS, num_labels=1, pad_token_id=0)
    return kind.from_config(config).eval()


def pad(rows: list[list[int]]) -> dict[str, Any]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "use_cache": False,
    }


def count_tokens(model: Any) -> list[int]:
    """Return a list that gets the number of tokens that each call of the trunk embeds."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    return counts


# ---- values and gradients ----


@st.composite
def batches(draw: Any) -> list[list[int]]:
    """Rows that continue one another's beginnings at random places."""
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from(rows)) if rows else []
        kept = parent[: draw(st.integers(0, len(parent)))]
        rows.append([*kept, *draw(st.lists(st.integers(1, 63), min_size=0 if kept else 1, max_size=24))])
    return rows


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans())
def test_states_and_gradients_are_those_of_padded_rows(rows: list[list[int]], share: bool) -> None:
    model, inputs = make_model(), pad(rows)
    real = inputs["attention_mask"].bool()
    weights = torch.randn(*real.shape, SMALL["hidden_size"], generator=torch.Generator().manual_seed(1))
    results = []
    for hooked in (False, True):
        if hooked:
            assert compute_real_tokens(model, share)
        model.zero_grad()
        states = model.model(**inputs).last_hidden_state
        (states * weights)[real].sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([states[real], *map(torch.clone, gradients)])
    for padded, in_line in zip(*results, strict=True):
        assert torch.allclose(padded, in_line, atol=2e-4)
    assert (states[~real] == 0).all()


@pytest.mark.parametrize("config", [None, Qwen3Config(**SMALL, **HEADS, head_dim=8, num_labels=1, pad_token_id=0)])
def test_a_reward_model_scores_rows_as_before(config: Any) -> None:
    model = make_model(config, AutoModelForSequenceClassification)
    counts = count_tokens(model)
    before = model(**pad(PAIR)).logits
    assert compute_real_tokens(model)
    assert torch.allclose(model(**pad(PAIR)).logits, before, atol=1e-5)
    assert counts[0] == 30 and counts[-1] == 17  # the prompt once, and 3 + 2 tokens of the answers


def test_margin_of_pairs_keeps_the_real_tokens() -> None:
    """trl passes the margins of its loss to the model with the tokens."""
    model = make_model(kind=AutoModelForSequenceClassification)
    counts = count_tokens(model)
    inputs = {**pad(PAIR), "margin": torch.tensor([0.5])}
    before = model(**inputs).logits
    assert compute_real_tokens(model)
    assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
    assert (counts[0], counts[-1]) == (30, 17)


def test_without_sharing_every_row_is_computed_whole() -> None:
    model = make_model()
    assert compute_real_tokens(model, share=False)
    counts = count_tokens(model)
    model.model(**pad(PAIR))
    assert counts == [29]


def test_adapters_and_copies_of_a_model_keep_the_hooks() -> None:
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    before = model(**pad(PAIR)).logits[:, :2]
    assert compute_real_tokens(model) and computes_real_tokens(model)
    twin = copy.deepcopy(model)
    remove_hooks(model.get_base_model().base_model)
    counts = count_tokens(twin)
    assert torch.allclose(twin(**pad(PAIR)).logits[:, :2], before, atol=1e-5)
    assert counts == [17] and not computes_real_tokens(model)


@pytest.mark.parametrize(
    "embedding",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 20]},
    ],
)
def test_an_embedding_with_adapters_computes_real_tokens(embedding: dict[str, Any]) -> None:
    model = get_peft_model(make_model(), LoraConfig(r=2, init_lora_weights=False, **embedding)).eval()
    real = pad(PAIR)["attention_mask"].bool()
    before = model(**pad(PAIR)).logits[real]
    assert compute_real_tokens(model)
    assert torch.allclose(model(**pad(PAIR)).logits[real], before, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model = make_model().train()
    assert compute_real_tokens(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model.model(**pad(PAIR)).last_hidden_state.square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


# ---- what is left alone ----


@pytest.mark.parametrize(
    "changed",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"attention_mask": torch.tensor([[0] + [1] * 14, [0] + [1] * 14])},  # left-padded
        {"attention_mask": torch.tensor([[1] * 15, [0] * 15])},  # an empty row
        {"attention_mask": None},
        {"position_ids": torch.arange(15)[None].expand(2, -1)},
    ],
)
def test_calls_of_another_kind_pass_unchanged(changed: dict[str, Any]) -> None:
    model = make_model()
    inputs = {**pad([PAIR[0], PAIR[0]]), **changed}
    before = model.model(**inputs).last_hidden_state
    assert compute_real_tokens(model)
    counts = count_tokens(model)
    assert torch.allclose(model.model(**inputs).last_hidden_state, before, atol=1e-5, equal_nan=True)
    assert counts == [30]


def test_embeddings_in_place_of_tokens_pass_unchanged() -> None:
    model = make_model()
    assert compute_real_tokens(model)
    inputs = pad(PAIR)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.model(inputs_embeds=embedded, **inputs).last_hidden_state.shape == (2, 15, 32)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, **HEADS, sliding_window=8),
        LlamaConfig(**SMALL, **HEADS, attention_dropout=0.1),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.1),
    ],
)
def test_a_model_with_other_attention_is_refused(config: Any) -> None:
    model = make_model(config)
    assert not compute_real_tokens(model)
    assert not computes_real_tokens(model)


def test_model_that_computes_lines_differently_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absolute positions that ignore ``position_ids``: rows behind the first one have others in a line."""
    model = make_model(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0))
    trunk = model.transformer
    forward = type(trunk).forward

    def without_positions(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(trunk), "forward", without_positions)
    with caplog.at_level(logging.WARNING):
        assert not compute_real_tokens(model)
    assert "computes rows in one line differently" in caplog.text
    assert not computes_real_tokens(model)
