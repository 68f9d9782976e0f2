"""Kinds that train adapters, in a pipeline whose frozen base is in bfloat16, on every processor."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from align.cli.main import main

PIPELINE = """
name: narrow
seed: 7
precision: bfloat16
runtime: {{engine: {{name: transformers}}}}
stages:
  model: {{source: tiny, dtype: bfloat16}}
  data: {{recipe: {recipe}, max_rows: 100}}
  sft: {{model: model, data: data, {fields}}}
  sample: {{policy: sft, prompts: data, n: 4, max_tokens: 16, score: "examples.scorers:letters"}}
  reward: {{model: sft, data: sample, {fields}, lint: {{waive: [not-utf8]}}}}
  dpo: {{policy: sft, data: sample, {fields}, lint: {{waive: [not-utf8]}}}}
  distill: {{model: sft, teacher: dpo, data: data, {fields}}}
  ppo: {{policy: sft, reward: reward, reward_floor: null, critic_learning_rate: null, {rl}}}
"""
FIELDS = "learning_rate: 1.0e-3, max_steps: 4, batch_size: 8, max_length: 512, tuning: {method: lora}"
RL = (
    "prompts: data, updates: 2, rollout_batch: 16, max_tokens: 16, learning_rate: 1.0e-3, "
    "tuning: {method: lora, rank: 4}"
)


@pytest.mark.usefixtures("stages_in_process")
def test_kinds_train_adapters_on_a_bfloat16_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    file = tmp_path / "narrow.yaml"
    file.write_text(PIPELINE.format(recipe=root / "data_recipes" / "embedded.yaml", fields=FIELDS, rl=RL))
    assert main(["run", str(file), "--store", str(tmp_path / "store")]) == 0
    for kind in ("sft", "reward", "dpo", "distill", "ppo"):
        (weights,) = (tmp_path / "store" / kind).glob("*/model/model.safetensors")
        with safe_open(weights, framework="pt") as tensors:
            names = list(tensors.keys())
            types = {name: str(tensors.get_tensor(name).dtype) for name in names}
        # A trained score head is the only tensor that is not in the type of the source's files.
        assert {name for name, kind_of in types.items() if kind_of != "torch.bfloat16"} <= {"score.weight"}
