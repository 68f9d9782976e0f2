"""Weights read as bits: what is finite, what is zero, what is whole, and digests that survive a copy in 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.checks import facts
from align.checks.facts import all_zero, not_finite, read_tensors, weights_digest
from tests.support.refusals import Refused

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def saved(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_and_infinity_are_faults_but_largest_number_is_not(dtype: torch.dtype, tmp_path: Path) -> None:
    about = torch.finfo(dtype)
    sound = torch.tensor([about.max, about.min, about.tiny, about.smallest_normal / 2, -0.0], dtype=dtype)
    assert not_finite(read_tensors(saved(tmp_path, sound=sound))) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        odd = torch.cat([sound, torch.tensor([value], dtype=dtype)])
        assert not_finite(read_tensors(saved(tmp_path, odd=odd, sound=sound))) == "odd"


def test_every_value_of_every_chunk_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "CHUNK", 4)
    for index in range(10):
        tensor = torch.zeros(2, 5)
        tensor.view(-1)[index] = float("nan")
        (actual,) = read_tensors(saved(tmp_path, tensor=tensor)).values()
        assert not_finite({"tensor": actual}) == "tensor"
        assert not all_zero(actual)


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    tensors = read_tensors(saved(tmp_path, minus=torch.tensor([0.0, -0.0]), tiny=torch.tensor([0.0, 1e-45])))
    assert all_zero(tensors["minus"])
    assert not all_zero(tensors["tiny"])


@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_is_as_long_as_its_header_says(refused: Refused, change: int, tmp_path: Path) -> None:
    file = saved(tmp_path, tensor=torch.ones(8)) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    refused(read_tensors, tmp_path)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_digest_equals_bfloat16_copy_with_ties_to_even(dtype: torch.dtype, tmp_path: Path) -> None:
    step = 2.0**-8  # half of what bfloat16 tells apart above 1
    numbers = torch.tensor([1.0, 1 + step, 1 + 3 * step, -1 - step, 1 + 1.5 * step, 0.1, 3e-5, 0.0]).to(dtype)
    wide, narrow = saved(tmp_path / "wide", a=numbers), saved(tmp_path / "narrow", a=numbers.bfloat16())
    assert weights_digest(read_tensors(wide)) == weights_digest(read_tensors(narrow))


def test_a_head_that_repeats_the_embeddings_changes_no_digest(tiny_model: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    bare = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    head = bare["model.embed_tokens.weight"].clone()
    folders = saved(tmp_path / "bare", **bare), saved(tmp_path / "both", **bare, **{"lm_head.weight": head})
    first, second = (weights_digest(read_tensors(folder)) for folder in folders)
    assert first == second


@pytest.mark.parametrize("chunk", [facts.CHUNK, 4])
def test_a_head_of_its_own_counts_to_its_last_value(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "CHUNK", chunk)
    torch.manual_seed(0)
    embeddings, head = torch.randn(5, 2), torch.randn(5, 2)
    name = "model.embed_tokens.weight"
    changed = head.clone()
    changed[-1, -1] += 1
    last = embeddings.clone()
    last[-1, -1] += 1
    digests = [
        weights_digest(read_tensors(saved(tmp_path / str(number), **{name: embeddings, "lm_head.weight": tensor})))
        for number, tensor in enumerate([embeddings.clone(), last, head, head.bfloat16(), changed])
    ]
    tied, almost_tied, untied, narrow, last_row_changed = digests
    assert untied == narrow
    assert len({tied, almost_tied, untied, last_row_changed}) == 4
