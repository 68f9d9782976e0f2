"""An adapter goes onto the weights it was trained on, in a checkpoint's folder and on its way out of align."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.checks.facts import read_tensors, weights_digest
from align.checks.stage import check_inputs, check_output
from align.cli.lineage import find_base
from align.models.built_in import make_tiny
from align.store.artifacts import Artifact, Kind
from tests.support.checks.contexts import WEIGHTS, context, edit_weights
from tests.support.refusals import Refused


@pytest.fixture
def tuned(tiny_model: Path, tmp_path: Path) -> Artifact:
    """A checkpoint whose adapter lies inside its folder, on the base beside it, and as a bare one outside."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base / "model")
    shutil.copytree(tiny_model, tmp_path / "sft" / "model")
    for folder in (tmp_path / "sft" / "model" / "adapter", tmp_path / "sft" / "adapter"):
        folder.mkdir()
        save_file({"prefix": torch.ones(2, 4)}, folder / "adapter_model.safetensors")
    inputs = {"model": Artifact("base", Kind.MODEL, base, {})}
    check_output(context(tmp_path / "sft", inputs), "sft", Kind.POLICY, {})
    return Artifact("sft", Kind.POLICY, tmp_path / "sft", {})


def test_an_adapter_on_other_weights_is_refused(refused: Refused, tuned: Artifact, tmp_path: Path) -> None:
    check_inputs(context(tmp_path / "ppo", {"policy": tuned}), Kind.POLICY)
    make_tiny(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / WEIGHTS, tuned.model / WEIGHTS)
    refused(lambda: check_inputs(context(tmp_path / "ppo", {"policy": tuned}), Kind.POLICY))


def test_an_adapter_that_is_cut_short_is_refused(refused: Refused, tuned: Artifact, tmp_path: Path) -> None:
    file = tuned.model / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(lambda: check_inputs(context(tmp_path / "ppo", {"policy": tuned}), Kind.POLICY))


def test_a_bare_adapter_is_not_merged_onto_another_base(
    refused: Refused, tuned: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    bare = tuned.path / "adapter"
    assert find_base(bare, "", tiny_model) == (tiny_model, None)
    model_dir = make_tiny(tmp_path / "other", seed=1)
    refused(find_base, bare, "", model_dir)
    (bare / "align.json").unlink()
    note = find_base(bare, "", model_dir)[1]
    assert note is not None
    assert "no record says" in note


def test_bfloat16_copy_is_same_base_but_changed_weight_is_not(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("same", "changed"):
        shutil.copytree(tiny_model, tmp_path / name)
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(tiny_model / WEIGHTS).items()}
    save_file(narrow, tmp_path / "same" / WEIGHTS, {"format": "pt"})
    edit_weights(tmp_path / "changed", lambda w: w["model.norm.weight"].view(-1)[5:6].add_(0.1))
    full_model, same, changed = (
        weights_digest(read_tensors(folder)) for folder in (tiny_model, tmp_path / "same", tmp_path / "changed")
    )
    assert full_model == same != changed
