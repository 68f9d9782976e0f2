"""GPTQ and AWQ folders are what llm-compressor's environment wrote, read back in float32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.export.export import Source, export
from align.extensions.formats.calibrated import (
    CALIBRATED_FORMATS,
    CalibratedFormat,
    Calibration,
    check_python,
    choose_group_size,
    join_rows,
    read_calibrated,
    read_calibration,
    unpack,
    write_calibrated,
)
from align.extensions.formats.compressed import linear_weights
from align.models.loading import load_policy, load_tokenizer
from tests.support.data.sample_build import pair, row, write_build
from tests.support.fake_llmcompressor import VERSION, write_interpreter
from tests.support.models.families import write_family
from tests.support.refusals import Refused

MATRIX = "model.layers.0.mlp.up_proj.weight"
REAL = "ALIGN_LLMCOMPRESSOR"


@pytest.fixture
def plain(tiny_model: Path, tmp_path: Path) -> Path:
    export(Source(tiny_model), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    return Calibration(Path(write_interpreter(tmp_path / "python")), VERSION, [[1, 40, 41, 2]], "rows", 32)


@pytest.fixture
def written(plain: Path, calibration: Calibration, tmp_path: Path) -> Callable[[CalibratedFormat], Path]:
    def write(name: CalibratedFormat) -> Path:
        write_calibrated(plain, tmp_path / "out", name, calibration, tmp_path / "job")
        return tmp_path / "out"

    return write


def change(folder: Path, changes: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    changes(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_unpack_reads_what_compressed_tensors_packs() -> None:
    numbers = torch.from_numpy(np.random.default_rng(0).integers(-8, 8, (6, 64)).astype(np.int8))
    assert torch.equal(unpack(pack_to_int32(numbers, 4), 64) - 8, numbers)
    zeros = pack_to_int32(numbers[:, :3], 4, packed_dim=0)
    assert torch.equal(unpack(zeros.T.contiguous(), 6).T - 8, numbers[:, :3])


@pytest.mark.parametrize("name", CALIBRATED_FORMATS)
def test_transformers_reads_the_same_weights(
    name: CalibratedFormat, plain: Path, written: Callable[[CalibratedFormat], Path], tmp_path: Path
) -> None:
    folder = written(name)
    read_calibrated(plain, folder, tmp_path / "read", name)
    ours = load_policy(tmp_path / "read")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs(input_ids=torch.tensor([[1, 40, 41]]))  # the first forward pass decompresses the weights
    read = theirs.state_dict()
    assert all(torch.allclose(read[key], weight, rtol=1e-6) for key, weight in ours.state_dict().items())
    before = load_file(plain / "model.safetensors")
    after = load_file(tmp_path / "read" / "model.safetensors")
    errors = {key: float((after[key] - before[key]).norm() / before[key].norm()) for key in before}
    rounded = linear_weights(plain)
    assert all(0.02 < errors[key] < 0.15 for key in rounded) and len(rounded) == 14
    assert all(errors[key] == 0 for key in errors.keys() - rounded)


def test_folder_has_checkpoint_s_own_files(
    plain: Path, written: Callable[[CalibratedFormat], Path], tmp_path: Path
) -> None:
    folder = written("gptq")
    assert {path.name for path in folder.iterdir()} == {path.name for path in plain.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((plain / "config.json").read_text())
    assert quantization["format"] == "pack-quantized" and quantization["ignore"] == ["lm_head"]
    job = json.loads((tmp_path / "job" / "job.json").read_text())
    assert job["is_symmetric"] is True and job["rows"] == [[1, 40, 41, 2]] and job["dtype"] == "float32"


@pytest.mark.parametrize(
    "changes",
    [
        lambda tensors: tensors.pop(f"{MATRIX}_scale"),
        lambda tensors: tensors[f"{MATRIX}_scale"].mul_(3),
        lambda tensors: tensors[f"{MATRIX}_scale"].fill_(torch.nan),
        lambda tensors: tensors[f"{MATRIX}_shape"].fill_(64),
        lambda tensors: tensors["model.norm.weight"].mul_(2),
        lambda tensors: tensors["model.embed_tokens.weight"].mul_(2),
        lambda tensors: tensors.update(lm_head=torch.ones(1)),
    ],
)
def test_tensor_that_does_not_fit_fails(
    refused: Refused,
    changes: Callable[[dict[str, Any]], object],
    plain: Path,
    written: Callable[[CalibratedFormat], Path],
    tmp_path: Path,
) -> None:
    folder = written("gptq")
    change(folder, changes)
    refused(read_calibrated, plain, folder, tmp_path / "read", "gptq")


def test_awq_may_scale_norms_but_not_the_embedding(
    refused: Refused, plain: Path, written: Callable[[CalibratedFormat], Path], tmp_path: Path
) -> None:
    folder = written("awq")
    change(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    read_calibrated(plain, folder, tmp_path / "read", "awq")
    read = load_file(tmp_path / "read" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(read, load_file(plain / "model.safetensors")["model.norm.weight"] * 2)
    change(folder, lambda tensors: tensors["model.embed_tokens.weight"].mul_(2))
    refused(read_calibrated, plain, folder, tmp_path / "again", "awq")


def test_failed_job_quotes_its_last_line(
    refused: Refused, plain: Path, calibration: Calibration, tmp_path: Path
) -> None:
    python = tmp_path / "failing"
    python.write_text("#!/bin/sh\necho 'first' >&2\necho 'ValueError: no mapping' >&2\nexit 3\n")
    python.chmod(0o755)
    refused(
        lambda: write_calibrated(plain, tmp_path / "out", "awq", replace(calibration, python=python), tmp_path / "job")
    )


def test_interpreter_without_the_package_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(check_python, None, "gptq")
    refused(check_python, "nowhere/python", "gptq")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'llmcompressor'\" >&2\nexit 1\n")
    python.chmod(0o755)
    refused(lambda: check_python(str(python), "awq"))
    assert check_python(write_interpreter(tmp_path / "fake"), "awq") == (tmp_path / "fake", VERSION)


def test_group_size_divides_every_row(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    # The tiny model's rows have 64 and 128 numbers.
    assert choose_group_size(tiny_model, None) == 64
    assert choose_group_size(tiny_model, 32) == 32
    refused(choose_group_size, tiny_model, 128)
    refused(choose_group_size, tiny_model, 48)
    refused(lambda: choose_group_size(write_family("gpt2", tmp_path / "gpt2"), None))


def test_rows_are_spread_over_the_training_split(tiny_model: Path, tmp_path: Path) -> None:
    build = write_build(tmp_path / "build", [row(f"question {index}", "yes") for index in range(10)], [])
    tokenizer: Any = load_tokenizer(tiny_model)
    texts = [tokenizer.decode(tokens) for tokens in read_calibration(build, 3, tiny_model)]
    assert [f"question {index}" in text for index, text in zip((0, 3, 6), texts, strict=True)] == [True] * 3
    assert all(text.rstrip().endswith("yes<|im_end|>") for text in texts)
    assert len(read_calibration(build, 99, tiny_model)) == 10


def test_rows_have_the_answer_that_is_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    rows = [pair("question", "good", "bad"), {**row("only asked", ""), "completion": None}]
    build = write_build(tmp_path / "build", rows, [])
    tokenizer: Any = load_tokenizer(tiny_model)
    chosen, asked = (tokenizer.decode(tokens) for tokens in read_calibration(build, 2, tiny_model))
    assert "good" in chosen and "bad" not in chosen and asked.rstrip().endswith("assistant")


def test_default_rows_are_embedded_instructions(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    rows = read_calibration(None, 16, tiny_model)
    assert len(rows) == 16 and rows == read_calibration(None, 16, tiny_model)
    refused(lambda: read_calibration(write_build(tmp_path / "build", [], [row("a", "b")]), 16, tiny_model))


def test_short_rows_are_joined_and_long_ones_stay() -> None:
    rows = [[1] * 300, [2] * 200, [3] * 13, [4] * 600, [5]]
    assert join_rows(rows) == [[1] * 300 + [2] * 200, [3] * 13, [4] * 600, [5]]
    assert rows[0] == [1] * 300


@pytest.mark.slow
@pytest.mark.parametrize("name", CALIBRATED_FORMATS)
def test_real_environment_rounds_a_model(name: CalibratedFormat, plain: Path, tiny_model: Path, tmp_path: Path) -> None:
    word = os.environ.get(REAL)
    if word is None:
        pytest.skip(f"${REAL} names no interpreter with llm-compressor")
    python, version = check_python(word, name)
    calibration = Calibration(python, version, read_calibration(None, 16, tiny_model), "rows", 64)
    write_calibrated(plain, tmp_path / "out", name, calibration, tmp_path / "job")
    read_calibrated(plain, tmp_path / "out", tmp_path / "read", name)
    ids = torch.tensor(calibration.rows[:1])
    with torch.no_grad():
        before, after = (
            load_policy(folder)(input_ids=ids).logits.log_softmax(-1) for folder in (plain, tmp_path / "read")
        )
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert 1e-5 < kl < 0.2
    assert torch.allclose(theirs.log_softmax(-1), after, atol=1e-4)
