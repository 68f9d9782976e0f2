"""Prefix, bottlenecks and LLaMA-Adapter: their formulas, peft's numbers, folding, storing, and training further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.config.tuning import AdaptersTuning, FullTuning, LoraTuning, PrefixTuning, TuningBase
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.tuning.apply import apply_tuning, initial_policy, load_for_tuning, save_tuned
from align.models.tuning.inserted_methods import MATRICES
from tests.support.models.tuning.confident_model import changed, saved, tuned
from tests.support.refusals import Refused

TALK = [{"role": "user", "content": "hello you"}]
PREFIX = PrefixTuning(tokens=4)
PARALLEL = AdaptersTuning(size=16)
HOULSBY = AdaptersTuning(position="sequential", size=16, after=["attention", "mlp"])
LLAMA = AdaptersTuning(kind="llama_adapter", tokens=4, layers=2)
STORED: dict[str, TuningBase] = {"prefix": PREFIX, "sequential": HOULSBY, "llama_adapter": LLAMA}
METHODS = STORED | {"parallel": PARALLEL}


def ids_of(tokenizer: Any) -> torch.Tensor:
    return torch.tensor([render_prompt(tokenizer, TALK)])


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("method", ["parallel", "sequential", "llama_adapter"])
def test_they_start_as_nothing(method: str, tiny_model: Path) -> None:
    model = apply_tuning(load_for_tuning(tiny_model, METHODS[method]), METHODS[method], 3)
    ids = ids_of(load_tokenizer(tiny_model))
    assert torch.equal(logits(model, ids), logits(load_policy(tiny_model), ids))
    moved = changed(model)
    assert (logits(moved, ids) - logits(load_policy(tiny_model), ids)).abs().max() > 0.1
    with initial_policy(moved):
        assert torch.equal(logits(moved, ids), logits(load_policy(tiny_model), ids))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_insertions_are_trained(method: str, tiny_model: Path) -> None:
    model, _ = tuned(tiny_model, METHODS[method])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    marks = (".prefix.", ".bottleneck.", ".llama_adapter.")
    assert trained and all(any(mark in name for mark in marks) for name in trained)
    reward, _ = tuned(tiny_model, METHODS[method], reward=True)
    assert {n for n, p in reward.named_parameters() if p.requires_grad} == {*trained, "score.weight"}


def test_a_parallel_bottleneck_becomes_a_wider_mlp(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = tuned(tiny_model, PARALLEL)
    save_tuned(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = ids_of(tokenizer)
    assert loaded.config.intermediate_size == 128 + 16
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-5)
    assert model.config.intermediate_size == 128  # the live model is as it was
    assert not (tmp_path / "model" / "adapter").exists()
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    bottleneck = mlp.bottleneck
    with torch.no_grad():
        # W_down (silu(W_gate x) * W_up x), arXiv 2110.04366's parallel placement with the model's own kind of MLP
        expected = (torch.nn.functional.silu(x @ bottleneck.gate.T) * (x @ bottleneck.up.T)) @ bottleneck.down.T
        bottleneck.enabled = False
        expected += mlp(x)
        bottleneck.enabled = True
        assert torch.allclose(mlp(x), expected, atol=1e-5)


def test_a_parallel_bottleneck_beside_an_mlp_with_biases(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model, mlp_bias=True)
    biased = LlamaForCausalLM(config)
    for name, parameter in biased.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    tokenizer = load_tokenizer(tiny_model)
    biased.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = tuned(tmp_path / "base", PARALLEL)
    save_tuned(model, tokenizer, tmp_path / "model")
    assert torch.allclose(logits(load_policy(tmp_path / "model"), ids_of(tokenizer)), logits(model, ids_of(tokenizer)),
                          atol=1e-5)  # fmt: skip


def test_a_sequential_bottleneck_is_its_formula(tiny_model: Path) -> None:
    model, _ = tuned(tiny_model, HOULSBY)
    mlp = model.model.layers[1].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    bottleneck = mlp.bottleneck
    with torch.no_grad():
        bottleneck.enabled = False
        plain = mlp(x)
        bottleneck.enabled = True
        # y + W_up gelu(W_down y + b) + c
        expected = (
            plain
            + torch.nn.functional.gelu(plain @ bottleneck.down.T + bottleneck.down_bias) @ bottleneck.up.T
            + bottleneck.up_bias
        )
        assert torch.allclose(mlp(x), expected, atol=1e-5)


def test_llama_adapter_gives_pefts_numbers(tiny_model: Path) -> None:
    from peft import AdaptionPromptConfig, get_peft_model

    model, tokenizer = tuned(tiny_model, LLAMA)
    theirs = get_peft_model(load_policy(tiny_model), AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    for ours, layer in zip(model.model.layers, theirs.base_model.model.model.layers, strict=True):
        with torch.no_grad():
            layer.self_attn.adaption_prompt.copy_(ours.self_attn.llama_adapter.prompt)
            layer.self_attn.adaption_gate.copy_(ours.self_attn.llama_adapter.gate)
    ids = ids_of(tokenizer)
    assert torch.allclose(logits(model, ids), logits(theirs.eval(), ids), atol=1e-4)
    assert (logits(model, ids) - logits(load_policy(tiny_model), ids)).abs().max() > 0.1


def test_a_prefix_gives_pefts_numbers(tiny_model: Path) -> None:
    """Ours are keys before rotation, at places 0 to 3; peft's are put in as they are, in front of place 4."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, tokenizer = tuned(tiny_model, PREFIX)
    theirs = get_peft_model(load_policy(tiny_model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    flat = []
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(4)[None])
        for layer in model.model.layers:
            keys, values = (getattr(layer.self_attn, name).prefix.rows for name in MATRICES)  # (4, 64)
            heads = keys.view(1, 4, 2, 32).transpose(1, 2)
            rotated, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
            flat += [rotated.transpose(1, 2).reshape(4, 64), values]
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.cat(flat, dim=1))
    ids = ids_of(tokenizer)
    with torch.no_grad():
        actual = theirs.eval()(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids[:, 4:])).logits
    ours = logits(model, ids)[:, 4:, : actual.shape[-1]]
    assert torch.allclose(ours, actual, atol=1e-4)
    assert (ours - logits(load_policy(tiny_model), ids[:, 4:])).abs().max() > 0.1


@pytest.mark.parametrize("method", STORED)
def test_stored_beside_the_frozen_model_and_loaded_with_it(method: str, tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(tiny_model, STORED[method])
    save_tuned(model, tokenizer, tmp_path / "model")
    ids = ids_of(load_tokenizer(tmp_path / "model"))
    assert torch.equal(logits(load_policy(tmp_path / "model"), ids), logits(model, ids))
    base = load_file(tiny_model / "model.safetensors")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert base.keys() == tensors.keys()
    assert all(torch.equal(tensors[name][: len(tensor)], tensor) for name, tensor in base.items())
    half = load_policy(tmp_path / "model", torch.bfloat16)
    assert torch.isfinite(logits(half, ids)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_scores_as_it_did(method: str, tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = tuned(tiny_model, METHODS[method], reward=True)
    save_tuned(model, tokenizer, tmp_path / "model")
    ids = ids_of(tokenizer)
    expected, actual = logits(model, ids), logits(load_reward(tmp_path / "model"), ids)
    assert torch.allclose(expected, actual, atol=1e-5)
    assert expected.abs().min() > 0


@pytest.mark.parametrize("method", STORED)
def test_trained_further_by_the_same_tuning_from_where_it_was(method: str, tiny_model: Path, tmp_path: Path) -> None:
    tuning = STORED[method]
    first = saved(tiny_model, tuning, tmp_path / "first" / "model")
    tokenizer = load_tokenizer(first, tuning)
    assert tokenizer.get_vocab() == load_tokenizer(first).get_vocab()
    model = apply_tuning(load_for_tuning(first, tuning), tuning, 3, tokenizer=tokenizer)
    ids, before = ids_of(tokenizer), load_policy(first)
    assert torch.equal(logits(model, ids), logits(before, ids))
    moved = changed(model, seed=9)
    now = logits(moved, ids)
    assert (now - logits(before, ids)).abs().max() > 0.1
    with initial_policy(moved):  # what came in, not the model without its adapter
        assert torch.equal(logits(moved, ids), logits(before, ids))
    assert torch.equal(logits(moved, ids), now)
    save_tuned(moved, tokenizer, tmp_path / "second" / "model")
    assert torch.equal(logits(load_policy(tmp_path / "second" / "model"), ids), now)


def gradients(model: Any, ids: torch.Tensor, *, look_back: bool) -> dict[str, torch.Tensor]:
    """Of what is trained; with ``look_back`` the start is asked between the forward and the backward pass."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    if look_back:
        with torch.no_grad(), initial_policy(model):
            model(ids)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("further", [False, True], ids=["new", "further"])
@pytest.mark.parametrize("method", METHODS)
def test_a_look_at_the_start_changes_no_gradient(
    method: str, further: bool, checkpointed: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """The anchor and the reuse of PPO's measuring pass ask for it while the graph waits for its backward pass."""
    tuning = METHODS[method]
    source = tiny_model
    if further and method in STORED:
        source = saved(tiny_model, tuning, tmp_path / "model")
    tokenizer = load_tokenizer(source, tuning)
    model = changed(apply_tuning(load_for_tuning(source, tuning), tuning, 3, tokenizer=tokenizer))
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = ids_of(tokenizer)
    expected = gradients(model, ids, look_back=False)
    actual = gradients(model, ids, look_back=True)
    assert expected and actual.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("method", STORED)
def test_the_start_is_the_start_within_one_autocast_too(method: str, tiny_model: Path, tmp_path: Path) -> None:
    tuning = STORED[method]
    source = saved(tiny_model, tuning, tmp_path / "model")
    tokenizer = load_tokenizer(source, tuning)
    model = apply_tuning(load_for_tuning(source, tuning), tuning, 3, tokenizer=tokenizer)
    ids = ids_of(tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(model, ids)
    changed(model, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        live = logits(model, ids)
        with initial_policy(model):
            assert torch.equal(logits(model, ids), start)
        assert torch.equal(logits(model, ids), live)
    assert not torch.equal(live, start)


def test_trained_further_in_full_it_keeps_its_adapter(tiny_model: Path, tmp_path: Path) -> None:
    first = saved(tiny_model, HOULSBY, tmp_path / "first" / "model")
    model = apply_tuning(load_for_tuning(first, FullTuning()), FullTuning(), 3)
    moved = changed(model, size=0.02)
    tokenizer = load_tokenizer(first)
    save_tuned(moved, tokenizer, tmp_path / "second" / "model")
    ids = ids_of(tokenizer)
    assert torch.equal(logits(load_policy(tmp_path / "second" / "model"), ids), logits(moved, ids))


@pytest.mark.parametrize(
    "second",
    [LoraTuning(), PREFIX, AdaptersTuning(position="sequential", size=24)],
    ids=lambda tuning_case: tuning_case.label,
)
def test_another_tuning_of_a_stored_adapter_is_refused(
    refused: Refused, second: TuningBase, tiny_model: Path, tmp_path: Path
) -> None:
    first = saved(tiny_model, HOULSBY, tmp_path / "first" / "model")
    model, tokenizer = load_for_tuning(first, second), load_tokenizer(first, second)
    refused(apply_tuning, model, second, 3, tokenizer=tokenizer)


def test_a_damaged_adapter_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model, HOULSBY, tmp_path / "model")
    weights, described = folder / "adapter" / "adapter.safetensors", folder / "adapter" / "adapter.json"
    full, text = load_file(weights), described.read_text(encoding="utf-8")
    name = "model.layers.0.mlp.bottleneck.up"
    save_file({key: tensor for key, tensor in full.items() if key != name}, weights)
    refused(load_policy, folder)
    save_file(full | {name: torch.zeros(64, 24)}, weights)
    refused(load_policy, folder)
    weights.write_bytes(b"half")
    refused(load_policy, folder)
    described.write_text(json.dumps(json.loads(text) | {"format": 2}), encoding="utf-8")
    refused(load_policy, folder)


def test_models_they_have_no_place_in_are_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=1, vocab_size=40))
    for tuning in (PARALLEL, HOULSBY):
        refused(apply_tuning, gpt2, tuning, 1)
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=32,
                    intermediate_size=32, vocab_size=40)
    )  # fmt: skip
    refused(apply_tuning, qwen3, LLAMA, 1)
    refused(lambda: apply_tuning(load_policy(tiny_model), AdaptersTuning(kind="llama_adapter", layers=3), 1))


@pytest.mark.parametrize("method", METHODS)
def test_with_a_cache_and_without_it_says_the_same(method: str, tiny_model: Path) -> None:
    model, tokenizer = tuned(tiny_model, METHODS[method])
    ids = ids_of(tokenizer)
    with torch.no_grad():
        full = model(ids).logits
        start = model(ids[:, :-3], use_cache=True)
        rest = model(ids[:, -3:], past_key_values=start.past_key_values, use_cache=True).logits
    assert torch.allclose(full[:, -3:], rest, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_ragged_rows_say_the_same(method: str, tiny_model: Path) -> None:
    from align.models.fast.ragged_rows import enable_ragged, hidden_states, make_layout

    model, tokenizer = tuned(tiny_model, METHODS[method])
    rows = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("hello", "a longer one", "x")]
    with torch.no_grad():
        alone = torch.cat([model.model(torch.tensor([row])).last_hidden_state[0] for row in rows])
        enable_ragged(model)
        ids = torch.tensor([[token for row in rows for token in row]])
        places = torch.tensor([[place for row in rows for place in range(len(row))]])
        together = hidden_states(model.model, ids, places, make_layout([len(row) for row in rows]))
    assert torch.allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("method", STORED)
def test_export_refuses_what_no_ordinary_folder_can_hold(
    refused: Refused, method: str, tiny_model: Path, tmp_path: Path
) -> None:
    from align.export.export import Source, check_source, export

    folder = saved(tiny_model, STORED[method], tmp_path / "model")
    refused(lambda: check_source(Source(folder)))
    plain = saved(tiny_model, PARALLEL, tmp_path / "parallel" / "model")
    export(Source(plain), tmp_path / "out")
    ids = ids_of(load_tokenizer(plain))
    assert torch.equal(logits(load_policy(tmp_path / "out"), ids), logits(load_policy(plain), ids))
