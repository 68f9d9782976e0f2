"""Sizes read from a config.json are those of the model that transformers builds from it, parameter for parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.tuning import (
    AdaptersTuning,
    FullTuning,
    Ia3Tuning,
    LoraTuning,
    PeftTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    TuningBase,
)
from align.errors import UserError
from align.models.built_in import NAME, fetch
from align.models.compute.architecture import UnknownArchitecture
from align.models.compute.model_types import RULES, architecture_of, read_architecture
from align.models.compute.precision import cast_frozen_to_bf16, low_residual
from align.models.fast.lean_modules import LeanRMSNorm
from align.models.model_plan import EMBEDDED_SIZES, TINY_SIZES, known_architecture
from align.models.tuning.apply import apply_tuning
from tests.support.models.families import FAMILIES
from tests.support.models.small_gguf import small_gguf
from tests.support.models.tuning.confident_model import confident_copy, tuned
from tools.model_matrix import PAGE, table_rows

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
OWN_HEADS = {"head_dim": 32}
ALSO = {
    "gpt2": {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": SIZES,
    **{kind: SIZES | OWN_HEADS | {"num_key_value_heads": 2} for kind in ("qwen3", "gemma", "gemma2", "gemma3_text")},
}
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")
VARIATIONS = ({}, *({switch: on} for switch in SWITCHES for on in (True, False)))


DENSE = (*ALSO, "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "smollm3")
"""Types whose methods of tuning and parts in bfloat16 are all tested."""
RARE: list[tuple[str, dict[str, Any]]] = [
    ("stablelm", {"qk_layernorm": True}),
    ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    ("phi", {"qk_layernorm": True}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"n_shared_experts": 2}),
    ("lfm2", {"block_auto_adjust_ff_dim": True}),
    ("lfm2", {"conv_bias": True}),
    ("falcon_h1", {"mamba_rms_norm": True, "projectors_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False}),
    ("falcon_h1", {"mamba_d_ssm": None}),
    ("granitemoehybrid", {"num_local_experts": 4}),
    ("granitemoehybrid", {"mamba_n_groups": 2}),
    ("gemma4_text", {"global_head_dim": 32}),
    ("gemma4_text", {"num_kv_shared_layers": 1, "use_double_wide_mlp": True}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_next", {"decoder_sparse_step": 2}),
    ("mamba2", {"use_bias": True, "use_conv_bias": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("starcoder2", {"use_bias": False}),
]
"""Fields that change the parts of some types."""


def settings(kind: str) -> dict[str, Any]:
    """Of a small model of that type."""
    if kind in DENSE:
        return ALSO.get(kind, SIZES | {"num_key_value_heads": 2})
    return FAMILIES[kind] | {"vocab_size": 300, "pad_token_id": 0, "max_position_embeddings": 128}


def sizes_of(kind: str) -> dict[str, Any]:
    """As in a config.json; sparse ones are tested for the older types only."""
    return {"model_type": kind, **settings(kind)} if kind in DENSE else built(kind).config.to_dict()


def built(kind: str, **extra: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings(kind) | extra))
    model.tie_weights()
    return model


def numel(module: Any, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


@pytest.mark.parametrize("extra", VARIATIONS, ids=str)
@pytest.mark.parametrize("kind", sorted(RULES))
def test_parameters_are_those_of_the_built_model(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    model = built(kind, **extra)
    model.config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path / "config.json")
    assert architecture.parameters == numel(model)
    assert architecture.trunk == numel(getattr(model, model.base_model_prefix))
    assert architecture.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    sizes = (model.config.hidden_size, 300, model.config.num_hidden_layers)
    assert (architecture.hidden, architecture.vocabulary, architecture.layers) == sizes


@pytest.mark.parametrize(("kind", "extra"), RARE, ids=str)
def test_rare_parts_count_as_the_model_has_them(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    test_parameters_are_those_of_the_built_model(kind, extra, tmp_path)


def test_families_without_a_rule_are_documented() -> None:
    rows = table_rows(PAGE.read_text(encoding="utf-8"))
    assert FAMILIES.keys() - RULES.keys() == {name for name, cells in rows.items() if "refused" in cells["memory"]}


def test_model_without_a_rule_for_its_parts_is_refused() -> None:
    for kind, extra in (("opt", {"word_embed_proj_dim": 16}), ("gemma4_text", {"enable_moe_block": True})):
        with pytest.raises(UnknownArchitecture, match="no rule for"):
            architecture_of({"model_type": kind, **settings(kind), **extra})


@pytest.mark.parametrize("kind", ["qwen3_5_text", "falcon_h1", "lfm2", "mamba2"])
def test_state_is_that_of_the_cache(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings(kind))).eval()
    output = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True)
    cache = output.cache_params if kind == "mamba2" else output.past_key_values
    states = [
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
    ]
    numbers = sum(state.numel() for state in states if state is not None)
    assert architecture_of(model.config.to_dict()).state == numbers > 0


def test_latent_attention_caches_its_latents() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **settings("deepseek_v3"))).eval()
    cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    values = sum(layer.keys[:, :, 0].numel() + layer.values[:, :, 0].numel() for layer in cache.layers)
    assert architecture_of(model.config.to_dict()).token_cache == values


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_are_those_that_peft_makes(kind: str) -> None:
    tuning = LoraTuning(rank=4, targets=["q_proj", "experts.gate_up_proj", "experts.down_proj"])
    with torch.device("meta"):
        adapted = apply_tuning(built(kind), tuning, 0)
    architecture = architecture_of(sizes_of(kind))
    assert architecture.adapters(tuning, "model") == numel(adapted, trained_only=True) > 0


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_what_a_config_does_not_say_is_the_type_s_default(kind: str) -> None:
    """Configs on the Hub leave out what is default, such as tied embeddings; saved ones say everything."""
    assert architecture_of({"model_type": kind, **settings(kind)}).parameters == numel(built(kind))


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"], ["layers.1.self_attn.k_proj"], ["o_proj", "lm_head"]],
    ids=str,
)
def test_adapters_are_those_that_peft_makes(targets: Any) -> None:
    tuning = LoraTuning(rank=4, targets=targets)
    with torch.device("meta"):
        adapted = apply_tuning(built("qwen3"), tuning, 0)
    architecture = architecture_of({"model_type": "qwen3", **settings("qwen3")})
    assert architecture.adapters(tuning, "model") == numel(adapted, trained_only=True) > 0
    head = sum(p.numel() for name, p in adapted.named_parameters() if "lm_head.lora" in name)
    assert architecture.adapters(tuning, "trunk") == architecture.adapters(tuning, "model") - head
    assert architecture.adapters(FullTuning(), "model") == 0
    assert architecture.adapters(LoraTuning(targets=["proj"]), "model") == 0  # the end of a name after a dot, no less


@pytest.mark.parametrize("kind", sorted(RULES))
def test_all_linear_means_the_same_in_every_type(kind: str) -> None:
    with torch.device("meta"):
        adapted = apply_tuning(built(kind), LoraTuning(rank=4), 0)
    architecture = architecture_of(sizes_of(kind))
    assert architecture.adapters(LoraTuning(rank=4), "model") == numel(adapted, trained_only=True)


@pytest.mark.parametrize(
    "tuning",
    [
        LoraTuning(rank=4, dora=True),
        LoraTuning(rank=2, save_modules=["embed_tokens"]),
        LoraTuning(rank=4, last_layers=1),
        LoraTuning(rank=4, last_layers=1, targets=["q_proj", "up_proj"]),
        LoraTuning(rank=2, last_layers=1, save_modules=["embed_tokens"]),
        LoraTuning(rank=2, save_modules=["o_proj"], targets=["q_proj"]),
        Ia3Tuning(targets=["v_proj", "up_proj"], feedforward=["up_proj"]),
    ],
    ids=["dora", "embeddings", "last", "last_some", "last_embeddings", "o_proj", "ia3"],
)
def test_so_do_variants_and_saved_modules(tuning: TuningBase) -> None:
    adapted = apply_tuning(built("llama"), tuning, 0)
    architecture = architecture_of({"model_type": "llama", **settings("llama")})
    assert architecture.adapters(tuning, "model") == numel(adapted, trained_only=True) > 0


@pytest.mark.parametrize("kind", sorted(set(DENSE) - {"gpt2"}))
def test_ia3_scales_the_same_in_every_type(kind: str) -> None:
    with torch.device("meta"):
        adapted = apply_tuning(built(kind), Ia3Tuning(), 0)
    architecture = architecture_of(sizes_of(kind))
    assert architecture.adapters(Ia3Tuning(), "model") == numel(adapted, trained_only=True) > 0


def test_a_method_without_a_rule_is_not_guessed() -> None:
    architecture = architecture_of({"model_type": "llama", **settings("llama")})
    with pytest.raises(UnknownArchitecture, match="no rule for what tuning vera adds"):
        architecture.adapters(PeftTuning(type="vera"), "model")
    with pytest.raises(UnknownArchitecture, match="size of the module 'rotary'"):
        architecture.adapters(LoraTuning(save_modules=["rotary"]), "model")


@pytest.mark.parametrize("kind", sorted(RULES))
def test_rounded_parts_and_lean_norms_agree_with_the_trainer(kind: str) -> None:
    model = built(kind).requires_grad_(False)
    trunk = getattr(model, model.base_model_prefix)
    low_residual(model)
    cast_frozen_to_bf16(trunk)
    architecture = architecture_of(sizes_of(kind))
    assert architecture.rounded == sum(p.numel() for p in trunk.parameters() if p.dtype is torch.bfloat16)
    assert architecture.lean_norms == any(isinstance(module, LeanRMSNorm) for module in model.modules())


def test_token_cache_is_that_of_the_model() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **settings("qwen3")))
    cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    values = sum(layer.keys[:, :, 0].numel() + layer.values[:, :, 0].numel() for layer in cache.layers)
    assert architecture_of(model.config.to_dict()).token_cache == values


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba", "hidden_size": 64}, "no rule for model_type 'mamba', only for arcee,"),
        ({}, "no rule for model_type 'None'"),
        (
            {"model_type": "llama", "hidden_size": 64},
            "this llama lacks a size or has an invalid one ('num_hidden_layers')",
        ),
        ({"model_type": "qwen2", **SIZES}, "this qwen2 lacks a size or has an invalid one ('num_key_value_heads')"),
        ({"model_type": "llama", **SIZES, "num_attention_heads": 0}, "lacks a size or has an invalid one"),
        ({"model_type": "llama", **SIZES, "hidden_size": "64"}, "lacks a size or has an invalid one"),
    ],
)
def test_nothing_is_guessed(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        architecture_of(config)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_file_that_is_no_config_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnknownArchitecture, match="cannot be read|no rule"):
        read_architecture(path)


def test_built_in_models_are_known_before_they_are_there(tiny_model: Path, tmp_path: Path) -> None:
    document = json.loads((tiny_model / "config.json").read_text())
    assert architecture_of(TINY_SIZES) == architecture_of(document)
    assert known_architecture("tiny", None, tmp_path) == architecture_of(TINY_SIZES)
    assert known_architecture(NAME, None, tmp_path).parameters == 134_515_008


@pytest.mark.slow
def test_the_embedded_model_has_the_sizes_that_are_written_down() -> None:
    from align.models.loading import load_policy

    folder = fetch()
    assert read_architecture(folder / "config.json") == architecture_of(EMBEDDED_SIZES)
    assert numel(load_policy(folder)) == architecture_of(EMBEDDED_SIZES).parameters


def test_a_folder_is_read_and_a_hub_model_only_from_the_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert known_architecture(str(tiny_model), None, tmp_path) == architecture_of(TINY_SIZES)
    with pytest.raises(UnknownArchitecture, match=f"`hf download some/model config.json --revision {commit}` fetches"):
        known_architecture("some/model", commit, tmp_path)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert known_architecture("some/model", commit, tmp_path).vocabulary == 300
    (tmp_path / "a.gguf").write_bytes(small_gguf())
    with pytest.raises(UnknownArchitecture, match="has no config.json before its model stage has run"):
        known_architecture("a.gguf", None, tmp_path)
    with pytest.raises(UserError, match="neither a built-in model"):
        known_architecture("nowhere", None, tmp_path)


INSERTED_TUNINGS = [
    PromptTuning(tokens=3),
    PTuning(tokens=3),
    PTuning(tokens=3, encoder="lstm", hidden_size=24),
    PrefixTuning(tokens=3),
    AdaptersTuning(size=16),
    AdaptersTuning(size=16, position="sequential", after=["attention", "mlp"]),
    AdaptersTuning(kind="llama_adapter", tokens=3),
    AdaptersTuning(kind="llama_adapter", tokens=3, layers=2),
]


@pytest.mark.parametrize(
    "tuning", INSERTED_TUNINGS, ids=[f"{tuning.label} {index}" for index, tuning in enumerate(INSERTED_TUNINGS)]
)
def test_inserted_parameters_are_those_that_are_trained(tuning: TuningBase, tiny_model: Path, tmp_path: Path) -> None:
    model, _ = tuned(confident_copy(tiny_model, tmp_path / "base"), tuning)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert read_architecture(tiny_model / "config.json").adapters(tuning, "model") == trained
