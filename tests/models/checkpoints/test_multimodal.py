"""The text part of a multimodal checkpoint trains, and export writes the whole checkpoint again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from align import Pipeline
from align.cli.main import main
from align.models.checkpoints.files import weight_files
from align.models.checkpoints.multimodal import FOLDER, is_multimodal, join, split, text_name
from align.models.compute.model_types import read_architecture
from tests.support.fork_server import start_module
from tests.support.models.families import write_family
from tests.support.models.multimodal import TEXT, write_multimodal
from tests.support.refusals import Refused

KINDS = pytest.mark.parametrize("kind", sorted(TEXT))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@KINDS
def test_text_part_equals_the_whole_model_on_text(kind: str, tmp_path: Path) -> None:
    whole = write_multimodal(kind, tmp_path / "whole")
    assert is_multimodal(whole)
    split(whole, tmp_path / "text", tmp_path / "rest")
    ids = torch.tensor([[5, 6, 7, 8]])
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    expected = AutoModelForImageTextToText.from_pretrained(whole).eval()(input_ids=ids).logits
    torch.testing.assert_close(part(input_ids=ids).logits, expected)
    assert part.config.model_type == TEXT[kind]
    counted = read_architecture(whole / "config.json").parameters
    assert counted == sum(parameter.numel() for parameter in part.parameters())


@KINDS
def test_join_restores_the_checkpoint(kind: str, tmp_path: Path) -> None:
    whole = write_multimodal(kind, tmp_path / "whole")
    split(whole, tmp_path / "text", tmp_path / "rest")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "joined")
    assert (
        join(tmp_path / "rest", tmp_path / "joined")
        == json.loads((whole / "config.json").read_text())["architectures"][0]
    )
    before, after = tensors_of(whole), tensors_of(tmp_path / "joined")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(text_name(name) is not None for name in changed)
    restored = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(restored(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert (tmp_path / "joined" / "preprocessor_config.json").is_file()


def test_checkpoint_without_text_tensors_is_refused(refused: Refused, tmp_path: Path) -> None:
    plain = write_family("llama", tmp_path / "llama")
    assert not is_multimodal(plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    for file in weight_files(plain):
        file.rename(file.with_name("unread.safetensors"))
    save_file({"vision_tower.weight": torch.zeros(2)}, plain / "model.safetensors")
    refused(split, plain, tmp_path / "text", tmp_path / "rest")


@pytest.mark.usefixtures("stages_in_process")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_trained_text_part_is_exported_whole(tuning: str, tmp_path: Path) -> None:
    whole = write_multimodal("gemma3", tmp_path / "whole")
    rows = [{"prompt": f"Say {number}", "completion": f"{number}"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    training: dict[str, Any] = {"stage": "sft", "model": "model", "data": "data", "tuning": {"method": tuning}}
    training |= {"learning_rate": 1e-2, "max_steps": 1, "warmup_ratio": 0.0, "batch_size": 4, "max_length": 64}
    stages = {
        "model": {"source": str(whole)},
        "data": {"stage": "data", "dataset": str(tmp_path / "rows.jsonl")},
        "sft": training,
    }
    run = Pipeline({"name": "multimodal", "seed": 1, "stages": stages}).run(store=tmp_path / "store")
    assert (run.artifacts["model"].path / FOLDER / "config.json").is_file()
    exported = tmp_path / "exported"
    assert main(["export", str(run.artifacts["sft"].path), "--output", str(exported), "--no-check"]) == 0
    before, after = tensors_of(whole), tensors_of(exported)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if text_name(name) is None:
            assert torch.equal(tensor, after[name])
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "mistral3"])
def test_vllm_runs_the_whole_checkpoint_on_text(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log.txt"
    process = start_module("tests.support.inference.vllm_multimodal", [kind, str(tmp_path)], log, vllm=True)
    assert process.wait(timeout=600) == 0, log.read_text()[-4000:]
    assert "all checks passed" in log.read_text()
