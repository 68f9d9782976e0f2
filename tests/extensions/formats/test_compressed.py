"""FP8 and W8A8 folders hold rounded weights that compressed-tensors and transformers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.export.export import Source, export, round_activations
from align.extensions.formats.compressed import (
    COMPRESSED_FORMATS,
    SCHEMES,
    CompressedFormat,
    check_compressed_source,
    linear_weights,
    read_compressed,
    round_weight,
    write_compressed,
)
from align.models.loading import load_policy
from tests.support.models.families import write_family
from tests.support.refusals import Refused

IDS = torch.tensor([[1, 40, 41, 42, 2, 1, 50, 60, 70, 80]])
MATRIX = "model.layers.0.mlp.up_proj.weight"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture
def plain(tiny_model: Path, tmp_path: Path) -> Path:
    export(Source(tiny_model), tmp_path / "plain")
    return tmp_path / "plain"


def test_int8_rounds_to_127_steps_of_a_row() -> None:
    # Row 1: scale 12.7 / 127 = 0.1, so 1.0, -12.7, 0.24 are 10, -127, 2 steps. Row 2 is zero and stays so.
    rounded, scale = round_weight(torch.tensor([[1.0, -12.7, 0.24], [0.0, 0.0, 0.0]]), SCHEMES["w8a8"])
    assert rounded.tolist() == [[10, -127, 2], [0, 0, 0]] and rounded.dtype == torch.int8
    assert scale[0].item() == pytest.approx(0.1)


def test_float8_scales_a_row_to_448() -> None:
    # Row: scale 2 / 448. 1.0 is 224, a number of e4m3; 0.3 is 67.2, whose neighbors are 64 and 72.
    rounded, scale = round_weight(torch.tensor([[1.0, -2.0, 0.3]]), SCHEMES["fp8"])
    assert rounded.float().tolist() == [[224.0, -448.0, 64.0]] and rounded.dtype == torch.float8_e4m3fn
    assert scale.item() == pytest.approx(2 / 448)


@pytest.mark.parametrize("name", COMPRESSED_FORMATS)
def test_transformers_reads_the_rounded_weights(name: CompressedFormat, plain: Path, tmp_path: Path) -> None:
    count = write_compressed(plain, tmp_path / "out", name)
    assert count == 2 * 7
    read_compressed(plain, tmp_path / "out", tmp_path / "read", name)
    ours = load_policy(tmp_path / "read")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits(theirs)  # the first forward pass decompresses the weights
    read = theirs.state_dict()
    assert all(torch.allclose(read[key], weight, rtol=1e-6) for key, weight in ours.state_dict().items())
    round_activations(ours, SCHEMES[name].activations)
    difference = (logits(ours) - logits(load_policy(plain))).abs().max()
    assert 1e-3 < difference < 0.5


@pytest.mark.parametrize("name", COMPRESSED_FORMATS)
def test_only_linear_layers_are_rounded(name: CompressedFormat, plain: Path, tmp_path: Path) -> None:
    write_compressed(plain, tmp_path / "out", name)
    before = load_file(plain / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    rounded = linear_weights(plain)
    assert after.keys() == before.keys() | {f"{key}_scale" for key in rounded}
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - rounded)
    assert {after[key].element_size() for key in rounded} == {1} and after[f"{MATRIX}_scale"].shape == (128, 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == SCHEMES[name].layout and config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


def test_weight_midway_between_two_steps_is_rounded(plain: Path, tmp_path: Path) -> None:
    weights = load_file(plain / "model.safetensors")
    # 105.5 steps of 2.402363 / 127: rounding in float32 makes the error 0.50001 steps.
    weights[MATRIX][0] = 0.0
    weights[MATRIX][0, :2] = torch.tensor([2.4023630619049072, 1.9956636428833008])
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    write_compressed(plain, tmp_path / "out", "w8a8")
    read_compressed(plain, tmp_path / "out", tmp_path / "read", "w8a8")


@pytest.mark.parametrize("name", COMPRESSED_FORMATS)
def test_changed_matrix_is_found(refused: Refused, name: CompressedFormat, plain: Path, tmp_path: Path) -> None:
    write_compressed(plain, tmp_path / "out", name)
    weights = load_file(plain / "model.safetensors")
    weights[MATRIX][0] *= 1.2
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    refused(read_compressed, plain, tmp_path / "out", tmp_path / "read", name)


def test_mixtures_and_reward_models_are_refused(refused: Refused, tiny_reward: Path, tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path / "model")
    refused(lambda: check_compressed_source(Source(folder), "fp8"))
    refused(lambda: check_compressed_source(Source(tiny_reward), "w8a8"))


def test_head_s_input_is_not_rounded(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    round_activations(model, "int8")
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    logits(model)
    steps = seen[0] / (seen[0].abs().amax(dim=-1, keepdim=True) / 127)
    assert (steps - steps.round()).abs().max() > 0.1
