"""What is measured on a GPU: models of the released sizes, and configs that every stage accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from align.capacity.plan import estimator_of
from align.models.compute.model_types import architecture_of, read_architecture
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.registry import STAGES
from benchmarks.gpu_items import (
    Item,
    Machine,
    adapter_items,
    card_items,
    determinism_items,
    peer_items,
    plan_items,
    training_items,
)
from benchmarks.gpu_models import SHAPES, make_model, sizes_of
from benchmarks.gpu_peers import measure
from benchmarks.gpu_run import operations_of_row
from benchmarks.gpu_table import WRITERS, summarize
from benchmarks.stage_work import FIELD, ROLLOUTS, config_of, reads_reward

MACHINES = [Machine("cuda", tiny=False), Machine("cpu", tiny=True)]


def items_of(machine: Machine) -> list[Item]:
    return [*training_items(machine), *plan_items(machine), *card_items(machine), *determinism_items(machine)]


@pytest.mark.parametrize("machine", MACHINES, ids=["card", "tiny"])
def test_every_item_is_a_valid_stage_that_the_plan_can_count(machine: Machine) -> None:
    for item in items_of(machine):
        stage = item.stage
        model = architecture_of(sizes_of(stage.shape, stage.tiny))
        models = {FIELD[stage.stage]: [model]} | (
            {"reward": [model]} if reads_reward(stage.stage, stage.fields) else {}
        )
        config = config_of(stage.stage, stage.fields)
        assert estimator_of(STAGES[stage.stage]).job(config, models, stage.runtime).trained > 0, item.name
        assert operations_of_row(stage, model) > 0, item.name
        # Two steps at the start are not timed, and one must be left.
        assert (config.updates if stage.stage in ROLLOUTS else config.max_steps) >= 3, item.name
        assert stage.length <= (config.max_prompt_tokens if stage.stage in ROLLOUTS else config.max_length), item.name


def test_defaults_are_measured_before_alternatives() -> None:
    names = [item.name for item in training_items(Machine("cuda", tiny=False))]
    assert len(set(names)) == len(names)
    stages = [f"{stage} {method}" for stage in ("sft", "reward", "dpo", "ppo", "grpo") for method in ("full", "lora")]
    plain = [f"{shape} {stage}" for shape in SHAPES for stage in stages]
    assert names[: len(plain)] == plain
    alternatives = names[len(plain) :]
    assert "qwen2.5-1.5b ppo full vllm" in alternatives
    assert "llama3.2-1b dpo lora liger" in alternatives
    assert "qwen2.5-0.5b reward full flash" in alternatives


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel" or None)
    obstacles = {item.name: item.obstacle for item in training_items(Machine("cuda", tiny=False))}
    assert obstacles["qwen2.5-0.5b sft full"] is None
    assert obstacles["qwen2.5-0.5b sft full liger"] is None
    assert obstacles["qwen2.5-0.5b sft full flash"] == "flash_attn is not installed"
    assert obstacles["qwen2.5-0.5b ppo full vllm"] == "vllm is not installed"
    on_processor = {item.name: item.obstacle for item in training_items(Machine("cpu", tiny=True))}
    assert on_processor["qwen2.5-0.5b sft full liger"] == "liger_kernel needs a GPU"


def test_adapters_are_measured_both_ways_at_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    items = adapter_items(Machine("cpu", tiny=True))
    names = ["r16 merged", "r16 kernels", "r64 merged", "r64 kernels"]
    assert [item.name for item in items[:4]] == [f"qwen2.5-0.5b {name}" for name in names]
    assert {item.obstacle for item in items} == {"vllm is not installed"}
    measured = {"bytes": 19_537_920, "seconds_of_update": 0.785, "tokens_per_second": 272.0, "gap": 0.0636}
    (row,) = [line for line in WRITERS["adapters"]({"r16 kernels": measured}) if "kernels" in line]
    assert row == "| r16 kernels | 19.5 | 0.785 | - | 272 | 0.0636 |"
    assert summarize(measured) == "update 0.785 s, 272 tokens/s"


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("llama3.2-1b", 1_235_814_400),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_the_shapes_have_the_released_models_parameters(shape: str, parameters: int) -> None:
    assert architecture_of(sizes_of(shape, tiny=False)).parameters == parameters


def test_trl_is_measured_on_the_sizes_of_training(tmp_path: Path) -> None:
    machine = Machine("cpu", tiny=True)
    trl, unsloth = peer_items(machine)[:2]
    assert (trl.name, unsloth.obstacle) == ("qwen2.5-0.5b sft lora trl", "unsloth needs a GPU")
    assert (
        trl.peer is not None and trl.peer.batch == config_of("sft", training_items(machine)[0].stage.fields).batch_size
    )
    result = measure(trl.peer, tmp_path)
    assert result["tokens_per_second"] > 0 and result["peak"] > 0


@pytest.mark.parametrize("shape", list(SHAPES))
def test_model_is_made_once_with_ids_beyond_tokenizer(shape: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, shape, tiny=True, device="cpu")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_model(tmp_path, shape, tiny=True, device="cpu") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)
    assert policy.config.model_type == SHAPES[shape]["model_type"]
    assert policy.num_parameters() == read_architecture(folder / "config.json").parameters
    assert len(tokenizer) < policy.config.vocab_size
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("a"), policy.config.vocab_size - 1]) == "a"


def test_another_attention_is_a_folder_with_the_same_weights(tmp_path: Path) -> None:
    plain = make_model(tmp_path, "qwen2.5-0.5b", tiny=True, device="cpu")
    flash = make_model(tmp_path, "qwen2.5-0.5b", tiny=True, device="cpu", attention="flash")
    assert (flash / "model.safetensors").samefile(plain / "model.safetensors")
    assert AutoConfig.from_pretrained(flash)._attn_implementation == "flash_attention_2"
    assert AutoConfig.from_pretrained(plain)._attn_implementation != "flash_attention_2"
