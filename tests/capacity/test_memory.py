"""Memory counted from sizes alone: by hand, and against what autograd really keeps."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.capacity import memory, sampling
from align.capacity.memory import (
    Memory,
    copied_parameters,
    engine_memory,
    model_bytes,
    on_host,
    ppo_memory,
    resolve_engine,
    state_bytes,
)
from align.config.runtime import Runtime
from align.config.tuning import FullTuning, LoraTuning, QloraTuning, TuningBase
from align.evaluation import logprobs as evaluation
from align.models.compute import costs as activations
from align.models.compute.architecture import Architecture
from align.models.compute.costs import FLOAT, activations_per_token
from align.models.compute.layers import Layer, Linear
from align.models.compute.model_types import architecture_of
from align.models.compute.precision import cast_frozen_to_bf16, low_residual
from align.models.fast import ragged_rows
from align.models.fast import token_logprobs as logprobs
from align.models.fast.ragged_rows import enable_ragged, hidden_states, make_layout
from align.models.tuning.apply import apply_tuning, weight_bytes
from align.models.tuning.quantized import quantize
from align.rl.model import trunk_of
from tests.support.peak_memory import peak_of

TOY_LAYER = Layer((Linear("q", 4, 5, True),), vectors=4, token_cache=6)
TOY = Architecture("toy", hidden=4, vocabulary=10, blocks=(TOY_LAYER,) * 2, embedded=40, last_norm=4, tied=True)
# A layer: 4 x 5 + 5 = 25 in its matrix, 4 in its norm. The trunk: 44 + 2 * 29 = 102; with a head of its own 142.
LORA = LoraTuning(rank=2)  # 2 layers x 2 x (4 + 5) = 36


def cost(tuning: Any, critic: Any, model: Architecture = TOY, precision: Any = "float32") -> Memory:
    return ppo_memory(model, [TOY], tuning=tuning, critic=critic, precision=precision)


def test_full_tuning_by_hand() -> None:
    counted = cost(FullTuning(), "policy", replace(TOY, tied=False))
    assert (counted.weights, counted.gradients, counted.optimizer) == (4 * 142, 4 * 142, 8 * 142)
    assert counted.reference == 4 * 142
    assert counted.critic == 16 * (102 + 4 + 1)  # the trunk without its vocabulary head, a value head, its bias
    assert counted.reward == 4 * (102 + 4)
    assert counted.copies == 0


def test_lora_shares_what_is_frozen() -> None:
    counted = cost(LORA, "policy")
    assert (counted.weights, counted.gradients, counted.optimizer) == (4 * (102 + 36), 4 * 36, 8 * 36)
    assert counted.reference == 0
    assert counted.critic == 16 * (36 + 4 + 1)
    assert cost(LORA, "head").critic == 16 * (4 + 1)


def test_bfloat16_copies_one_model_s_matrices_at_a_time() -> None:
    wide = LORA.model_copy(update={"base_dtype": "float32"})
    assert cost(LORA, "head", precision="bfloat16").copies == 0
    assert cost(wide, "head", precision="bfloat16").copies == 2 * (2 * 25 + 40)
    larger = replace(TOY, blocks=(TOY_LAYER,) * 10)
    options: Any = {"precision": "bfloat16", "critic": "reward"}
    assert ppo_memory(TOY, [larger], tuning=wide, **options).copies == 2 * (2 * 25 + 40)  # it is in bfloat16
    assert ppo_memory(TOY, [larger], tuning=FullTuning(), **options).copies == 2 * 10 * 25


def test_frozen_matrices_are_rounded_but_not_vectors() -> None:
    # 40 of the embedding and 2 x 20 of matrices without their biases; 5 + 4 in each layer and 4 behind stay float32
    trunk = 2 * 80 + 4 * 22
    counted = cost(FullTuning(), "policy", precision="bfloat16")
    assert counted.reference == trunk
    assert counted.reward == trunk + 4 * 4
    assert cost(FullTuning(), "policy", replace(TOY, tied=False), "bfloat16").reference == trunk + 2 * 40
    assert cost(LORA, "policy", precision="bfloat16").weights == trunk + 4 * 36  # the tied head is the embedding
    assert cost(LORA, "policy", replace(TOY, tied=False), "bfloat16").weights == trunk + 2 * 40 + 4 * 36
    assert replace(TOY, conv1d=True).rounded == 40


def test_the_critic_has_the_reward_model_s_size() -> None:
    larger = replace(TOY, embedded=1040)
    options: Any = {"tuning": FullTuning(), "precision": "float32"}
    counted = ppo_memory(TOY, [larger, TOY], critic="reward", **options)
    assert counted.critic == 16 * (1102 + 5)
    assert counted.reward == 4 * (1102 + 4 + 102 + 4)
    with pytest.raises(ValueError, match="there is no reward model"):
        ppo_memory(TOY, [], critic="reward", **options)


def test_released_cache_and_backward_pass_do_not_overlap() -> None:
    parts = Memory(weights=1, gradients=10, optimizer=100, copies=1000, logits=5, kv_cache=800)
    assert parts.total == 101 + 1015
    assert replace(parts, kv_cache=2000).total == 101 + 2000
    assert replace(parts, released="nothing").total == 101 + 1015 + 800
    assert replace(parts, engine=300, released="all").total == 101 + 800 + 300
    assert replace(parts, engine=200, released="all").total == 101 + 1015
    assert replace(parts, reference=1, critic=2, reward=3, engine=4).total == 101 + 1015 + 10


def test_base_is_away_while_the_engine_samples() -> None:
    parts = Memory(weights=100, base=90, gradients=1, optimizer=20, reference=30, activations=5, engine=200, kv_cache=7,
                   released="all")  # fmt: skip
    assert parts.phases(2)["sampling"] == {"weights": 100, "optimizer": 20, "reference": 30, "critic": 0, "reward": 0,
                                           "buffers": 0, "engine": 200, "kv_cache": 7}  # fmt: skip
    rested = on_host(parts, ["base"])
    assert sum(rested.phases(2)["sampling"].values()) == 10 + 20 + 207
    assert rested.phases(2)["learning"] == parts.phases(2)["learning"]


def test_state_in_host_memory_is_not_on_the_device() -> None:
    paged = on_host(cost(LORA, "policy"), ["optimizer"])
    assert (paged.optimizer, paged.critic) == (0, 8 * (36 + 4 + 1))  # weights and gradients


def test_states_of_8_and_4_bits_have_their_scales() -> None:
    # Two numbers a parameter; a float32 scale for 256 or 128 of them.
    assert state_bytes("adamw_8bit") == state_bytes("paged_adamw_8bit") == state_bytes("adamw_torch_8bit") == 2.03125
    assert state_bytes("adamw_torch_4bit") == 1.0625
    assert {state_bytes(name) for name in (None, "adamw_torch_fused", "paged_adamw_32bit", "lion_8bit")} == {8}
    counted = ppo_memory(TOY, [], tuning=LORA, critic="head", precision="float32", state=2.03125)
    assert (counted.optimizer, counted.critic) == (round(2.03125 * 36), round(10.03125 * 5))


def runtime(**engine: Any) -> Runtime:
    return Runtime.model_validate({"device": "cpu", "engine": engine})


def test_the_engine_has_weights_and_a_cache_of_its_own() -> None:
    options: Any = {"precision": "bfloat16", "sequences": 64, "length": 100}
    per_token = 2 * 2 * 3 * 2  # keys and values, bfloat16, width, layers
    plain = runtime(name="transformers")
    assert engine_memory(TOY, plain, **options) == (2 * 102, per_token * 64 * 100, "cache")
    assert engine_memory(TOY, runtime(name="transformers", batch_size=16), **options)[1] == per_token * 16 * 100
    assert engine_memory(TOY, runtime(name="transformers", dtype="float32"), **options)[0] == 4 * 102
    vllm = runtime(name="vllm", cpu_kv_cache_gb=0.5)
    assert engine_memory(TOY, vllm, **options) == (2 * (102 + 40), 2**29, "nothing")
    gpu = vllm.model_copy(update={"device": "cuda"})
    assert engine_memory(TOY, gpu, **options) == (2 * 102, per_token * 64 * 100, "all")
    awake = runtime(name="vllm", sleep=False).model_copy(update={"device": "cuda"})
    assert engine_memory(TOY, awake, **options) == (2 * 102, per_token * 64 * 100, "nothing")
    elsewhere = Runtime.model_validate({"device": "cpu", "rollouts": {"addresses": "http://x:1"}})
    assert engine_memory(TOY, elsewhere, **options) == (0, 0, "cache")
    two = Runtime.model_validate({"device": "cpu", "engine": {"cpu_kv_cache_gb": 0.5}, "rollouts": {"servers": 2}})
    assert engine_memory(TOY, two, **options) == (2 * 2 * (102 + 40), 2 * 2**29, "nothing")


@pytest.mark.parametrize(("installed", "name"), [(object(), "vllm"), (None, "transformers")])
def test_auto_is_what_would_be_taken(installed: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: installed)
    assert resolve_engine(runtime(name="auto")) == (name, False)
    assert resolve_engine(runtime(name="transformers")) == ("transformers", False)


def kept_bytes(model: Any, tokens: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass of two rows, as the trainer makes it; weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    computing: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    ids, places = torch.full((1, 2 * tokens), 5), torch.arange(tokens).repeat(2)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), computing:
        assert hidden_states(trunk_of(model), ids, places, make_layout([tokens, tokens])).requires_grad
        return sum(storage.nbytes() for storage in storages.values())


SHAPE = {"vocab_size": 300, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 3, "pad_token_id": 0,
         "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "tuning", [FullTuning(), LoraTuning(rank=16), LoraTuning(rank=16, last_layers=2)], ids=["full", "lora", "last"]
)
@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3", "olmo2", "gemma"])
def test_activations_are_what_autograd_keeps(kind: str, tuning: Any, precision: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE)).eval()
    sizes = architecture_of(model.config.to_dict())
    enable_ragged(model)
    model = apply_tuning(model, tuning, 0)
    low_residual(model)
    # What does not grow with the tokens, the bfloat16 copies of the matrices, drops out of the difference.
    few, more = (kept_bytes(model, tokens, precision) for tokens in (24, 40))
    counted = activations_per_token(sizes, tuning, precision)
    assert counted == pytest.approx((more - few) / (2 * 16), rel=0.06)
    if precision == "bfloat16" and isinstance(tuning, FullTuning):
        copies = few - 2 * 24 * (more - few) / (2 * 16)
        assert 2 * sizes.matrices == pytest.approx(copies, rel=0.02)


EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384,
           "intermediate_size": 384}  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(rank=16)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
def test_activations_of_mixtures_match_autograd(kind: str, tuning: Any, precision: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | EXPERTS)).eval()
    sizes = architecture_of(model.config.to_dict())
    enable_ragged(model)
    model = apply_tuning(model, tuning, 0)
    if precision == "bfloat16":
        cast_frozen_to_bf16(model, experts=True)  # as a base below adapters is loaded
    low_residual(model)
    few, more = (kept_bytes(model, tokens, precision) for tokens in (24, 40))
    growth = (more - few) / (2 * 16)
    assert activations_per_token(sizes, tuning, precision) == pytest.approx(growth, rel=0.03)
    if precision == "bfloat16" and tuning.trains_all:
        # Autocast copies the matrices of attention, and none of the experts.
        assert 2 * copied_parameters(sizes, tuning, False) == pytest.approx(few - 2 * 24 * growth, rel=0.1)


def test_activations_of_qwen3_30b_are_those_by_hand() -> None:
    config = {"model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
              "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
              "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}  # fmt: skip
    # One layer and one token, LoRA of rank 16 on attention; frozen experts compute in the base's bfloat16.
    experts = 8 * 2 * (3 * 768 + 2048) + 2 * 4 * 128  # and the router's logits and probabilities
    attention = 2 * 2 * (32 * 128 + 32 * 128)
    norms = 2 * (2 * 2048 + (32 + 4) * 128)
    layer = experts + attention + norms + 2 * 2048 + 2 * 16 * 4
    counted = activations_per_token(architecture_of(config), LoraTuning(rank=16), "bfloat16", flash=True)
    assert counted == 48 * layer + 2 * 2048
    assert counted * 4096 / 2**30 == pytest.approx(22.91, abs=0.01)  # GiB of a row


def test_long_rows_keep_keys_and_values_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activations.SHORT == ragged_rows.SHORT and sampling.HEAD_ROWS == evaluation.HEAD_ROWS
    monkeypatch.setattr(ragged_rows, "SHORT", 0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).eval()
    enable_ragged(model)
    low_residual(model)
    few, more = (kept_bytes(model, tokens, "bfloat16") for tokens in (24, 40))
    sizes = architecture_of(model.config.to_dict())
    counted = activations_per_token(sizes, FullTuning(), "bfloat16", flash=True)
    assert counted == pytest.approx((more - few) / (2 * 16), rel=0.06)
    assert counted > activations_per_token(sizes, FullTuning(), "bfloat16")  # type: ignore[operator]


def kept_by_padded_rows(model: Any, tokens: int, precision: str) -> int:
    """As ``kept_bytes``, of a forward pass as trl makes it."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    computing: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    ids = torch.full((2, tokens), 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), computing:
        assert trunk_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].requires_grad
        return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(), QloraTuning()], ids=lambda t: t.method)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_activations_of_trl_trainers_match_autograd(kind: str, tuning: TuningBase, precision: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE)).train()
    sizes = architecture_of(model.config.to_dict())
    model = apply_tuning(model, tuning, 0)
    few, more = (kept_by_padded_rows(model, tokens, precision) for tokens in (24, 40))
    counted = activations_per_token(sizes, tuning, precision, low_residual=False)
    assert counted == pytest.approx((more - few) / (2 * 16), rel=0.12)


@pytest.mark.parametrize("double", [True, False])
def test_a_model_in_four_bits_is_as_large_as_the_live_one(double: bool) -> None:
    tuning = QloraTuning(double_quantization=double)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    sizes = architecture_of(model.config.to_dict())
    quantize(model, tuning)
    assert model_bytes(sizes, tuning, "float32") == pytest.approx(weight_bytes(model), rel=1e-3)
    model.requires_grad_(False)
    cast_frozen_to_bf16(model)
    assert model_bytes(sizes, tuning, "bfloat16") == pytest.approx(weight_bytes(model), rel=1e-3)
    assert model_bytes(sizes, FullTuning(), "bfloat16") == 4 * sizes.parameters


def test_ppo_with_matrices_that_cannot_be_shared() -> None:
    options: Any = {"precision": "bfloat16"}
    four = ppo_memory(TOY, [TOY], tuning=QloraTuning(rank=2), critic="policy", **options)
    assert four.copies == 0  # 4-bit matrices are dequantized anew in the backward pass
    assert four.critic == 16 * (36 + 4 + 1)
    reward_critic = ppo_memory(TOY, [TOY], tuning=QloraTuning(rank=2), critic="reward", **options)
    # Frozen matrices of its own are none that the critic trains, whose state is saved and sharded.
    assert reward_critic.critic == four.critic
    assert reward_critic.reference == four.reference + round(50 / 2 + 50 / 64 + 4 * 50 / 64 / 256)
    pissa = ppo_memory(TOY, [TOY], tuning=LoraTuning(rank=2, init="pissa"), critic="policy", **options)
    assert (pissa.critic, pissa.reference) == (16 * (36 + 4 + 1), 4 * 50)


def test_a_kind_of_layer_without_a_rule_has_no_activations() -> None:
    assert activations_per_token(TOY, FullTuning(), "float32") is None
    assert cost(FullTuning(), "policy").activations is None


def test_activations_count_the_larger_of_policy_and_critic() -> None:
    sizes = architecture_of({"model_type": "llama", **SHAPE})
    twice = replace(sizes, blocks=2 * sizes.blocks)

    def activations(critic: Any, reward: Architecture) -> int | None:
        return ppo_memory(sizes, [reward], tuning=LORA, critic=critic, precision="bfloat16").activations

    weights = activations_per_token(sizes, LORA, "bfloat16")
    assert activations("head", twice) == activations("policy", twice) == weights
    assert activations("reward", twice) == activations_per_token(twice, LORA, "bfloat16") != weights
    assert activations("reward", TOY) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("hidden", [32, 512])
def test_the_head_s_work_space_is_what_the_profiler_sees(precision: Any, trained: bool, hidden: int) -> None:
    assert memory.LOGITS_AT_ONCE == logprobs.LOGITS
    vocabulary = 4000
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(trained)
    states = torch.randn(512, hidden, requires_grad=True)  # a power of two: its blocks have the most logits
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        log_probabilities, _ = logprobs.token_logprobs(states, head, torch.zeros(512, dtype=torch.long), 1.0)
    loss = log_probabilities.sum()
    sizes = replace(TOY, vocabulary=vocabulary, hidden=hidden)
    counted = cost(FullTuning() if trained else LORA, "head", sizes, precision).logits
    counted += FLOAT * states.numel()  # their gradient
    assert counted == pytest.approx(peak_of(loss.backward), rel=0.05)
