"""Float32 masters keep small updates, and ``precision: auto`` follows measured speeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.config.stages.sft import SftConfig
from align.config.tuning import LoraTuning
from align.models.compute import costs
from align.models.compute import precision as product_speed
from align.models.compute.costs import ProductSpeed, read_speed, speed_key, with_expected_precision, write_speed
from align.models.compute.precision import autocast, cast_frozen_to_bf16, float32_products, low_residual
from align.models.fast.lean_modules import LeanRMSNorm
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning

RATE = 1e-6
IDS = torch.tensor([[1, 40, 41, 42]])


def _step(model: torch.nn.Module) -> float:
    """Share of the output projection's weights that one AdamW step at a usual PPO learning rate changes."""
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    before = weight.detach().clone()
    with autocast("cpu", "bfloat16"):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0).step()
    return (weight.detach() != before).float().mean().item()


def test_small_update_survives_only_in_float32(tiny_model: Path) -> None:
    # AdamW's first step moves each weight by the rate, 1e-6. A weight near 0.1 has neighbors 2**-12 = 2e-4 apart in
    # bfloat16, 7e-9 in float32.
    assert _step(load_policy(tiny_model)) > 0.95
    assert _step(load_policy(tiny_model, torch.bfloat16)) < 0.05


def test_autocast_rounds_products_only(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    with torch.no_grad():
        with autocast("cpu", "bfloat16"):
            assert model(IDS).logits.dtype == torch.bfloat16
        with autocast("cpu", "float32"):
            assert model(IDS).logits.dtype == torch.float32
    assert model.dtype == torch.float32


def test_low_residual_returns_bfloat16_only_under_autocast(tiny_model: Path) -> None:
    plain, low = load_policy(tiny_model), load_policy(tiny_model)
    low_residual(low)
    kinds = []
    low.model.layers[1].register_forward_pre_hook(lambda _, inputs: kinds.append(inputs[0].dtype))
    with torch.no_grad():
        assert torch.equal(low(IDS).logits, plain(IDS).logits)
        with autocast("cpu", "bfloat16"):
            gap = (low(IDS).logits.float() - plain(IDS).logits.float()).abs().max()
    assert kinds == [torch.float32, torch.bfloat16]
    assert isinstance(low.model.norm, LeanRMSNorm)
    assert 0 < gap < 0.02 * plain(IDS).logits.abs().max()


def test_low_residual_keeps_weights_float32_and_lora_inputs_low(tiny_model: Path) -> None:
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=2), seed=0)
    low_residual(model)
    inputs = []
    for name, module in model.named_modules():
        if name.endswith("q_proj.lora_A.default"):
            module.register_forward_pre_hook(lambda _, values: inputs.append(values[0].dtype))
    with autocast("cpu", "bfloat16"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert set(inputs) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_frozen_matrices_in_bfloat16_compute_as_autocast(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    trained = model.model.layers[0].mlp.up_proj.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is trained)
    with torch.no_grad(), autocast("cpu", "bfloat16"):
        before = model(IDS).logits
        cast_frozen_to_bf16(model)
        # only the embedding's own rounding is new: the products rounded their operands already
        assert (model(IDS).logits - before).abs().max() < 0.02 * before.abs().max()
    assert trained.dtype == torch.float32
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32  # norms are neither Linear nor Embedding


def test_rounding_leaves_nothing_in_the_mapped_file(tiny_model: Path) -> None:
    model = load_policy(tiny_model).requires_grad_(False)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    cast_frozen_to_bf16(model)
    for name, parameter in model.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() != place
        assert torch.equal(parameter, value.to(parameter.dtype))


def test_frozen_bf16_base_changes_no_number(tiny_model: Path) -> None:
    def adapted(is_rounded: bool) -> torch.nn.Module:
        model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4), 0)
        low_residual(model)
        if is_rounded:
            cast_frozen_to_bf16(model)
        return model

    def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    losses = []
    models = [adapted(False), adapted(True)]
    for model in models:
        with autocast("cpu", "bfloat16"):
            losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    plain, rounded = models
    frozen = [p for name, p in rounded.named_parameters() if "lora_" not in name and "norm" not in name]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert rounded.get_input_embeddings().weight is rounded.get_output_embeddings().weight  # still tied
    assert torch.equal(losses[0], losses[1])
    wanted = gradients(plain)
    assert wanted and gradients(rounded).keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(rounded).items())


def test_float32_products_widen_one_module_at_a_time(tiny_model: Path) -> None:
    model = load_policy(tiny_model).requires_grad_(False)
    exact = load_policy(tiny_model)
    cast_frozen_to_bf16(model)
    for parameter in exact.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16().float()
    kinds = []
    model.model.layers[1].register_forward_pre_hook(
        lambda *_: kinds.append({p.dtype for p in model.model.layers[0].mlp.parameters()})
    )
    with torch.no_grad(), float32_products(model):
        logits = model(IDS).logits
    assert torch.equal(logits, exact(IDS).logits)
    assert kinds == [{torch.bfloat16}]  # the layer before is narrow again
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_embeddings_that_scale_their_rows_are_rounded_by_nobody(kind: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 80, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval().requires_grad_(False)
    low_residual(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad(), autocast("cpu", "bfloat16"):
        expected = model(IDS).logits  # rows times 80 ** 0.5 = 8.944, which is 8.938 in bfloat16
        cast_frozen_to_bf16(model)
        assert torch.equal(model(IDS).logits, expected)
    assert embedding.weight is head.weight and embedding.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


EMULATED, NATIVE = ProductSpeed(bfloat16=14.0, float32=134.0), ProductSpeed(bfloat16=430.0, float32=185.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for name in costs.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_faster_type_is_the_measured_one() -> None:
    assert EMULATED.faster == "float32" and EMULATED.emulates_bfloat16
    assert NATIVE.faster == "bfloat16" and not NATIVE.emulates_bfloat16
    # Equal speeds: bfloat16 needs half the memory.
    assert ProductSpeed(100.0, 100.0).faster == "bfloat16"
    # AVX-512 without bfloat16 instructions is a little slower in bfloat16, which is no emulation.
    assert ProductSpeed(80.0, 100.0).faster == "float32" and not ProductSpeed(80.0, 100.0).emulates_bfloat16


def test_speed_is_kept_per_processor_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_speed() is None
    write_speed(NATIVE)
    assert read_speed() == NATIVE
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert read_speed() is None
    write_speed(EMULATED)
    assert read_speed() == EMULATED
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert read_speed() == NATIVE
    assert read_speed("NVIDIA H100") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", '{"KEY": {"bfloat16": 0, "float32": 1}}', '{"KEY": 3}'])
def test_damaged_cache_is_measured_again(content: str, cache: Path) -> None:
    cache.mkdir()
    (cache / "product_speed.json").write_text(content.replace("KEY", speed_key()))
    assert read_speed() is None
    write_speed(NATIVE)
    assert read_speed() == NATIVE


def test_cache_folder_that_is_a_file_is_no_error(cache: Path) -> None:
    cache.write_text("")
    write_speed(NATIVE)
    assert read_speed() is None


def test_speed_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.device] = []

    def measure(device: torch.device) -> ProductSpeed:
        measured.append(device)
        return EMULATED

    monkeypatch.setattr(product_speed, "measure", measure)
    assert [product_speed.resolve_precision("auto", CPU) for _ in range(2)] == ["float32", "float32"]
    assert measured == [CPU]
    assert product_speed.resolve_precision("bfloat16", CPU) == "bfloat16"


def test_measurement_takes_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Warm-up, then products of 10 ms and 5 ms until 20 ms are spent: 10 + 5 + 5.
    seconds = iter([1.0, 0.010, 0.005, 0.005])
    monkeypatch.setattr(product_speed, "_seconds", lambda left, weight: next(seconds))
    rows, inputs, outputs = product_speed.CPU_SHAPE
    operations = 2 * rows * inputs * outputs
    assert product_speed._speed_in(torch.float32, CPU) == pytest.approx(operations / 0.005 / 1e9)


def test_both_types_are_really_measured() -> None:
    speed = product_speed.measure(CPU)
    assert speed.bfloat16 > 0.01 and speed.float32 > 0.01


@pytest.mark.parametrize(("speed", "expected"), [(EMULATED, "float32"), (NATIVE, "bfloat16")])
def test_estimate_expects_the_measured_type(speed: ProductSpeed, expected: str) -> None:
    write_speed(speed)
    config = SftConfig(model="m", data="d", learning_rate=1e-3)
    assert with_expected_precision(config, gpu=False).precision == expected
    assert with_expected_precision(config, gpu=True).precision == "bfloat16"
    explicit = config.model_copy(update={"precision": "float32"})
    assert with_expected_precision(explicit, gpu=True).precision == "float32"


@pytest.mark.parametrize(("flags", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_estimate_without_measurement_reads_flags(flags: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "has_bf16_flags", lambda: flags)
    assert costs.expected_precision(gpu=False) == expected
