"""Names of other tools are answered with align's field, which exists in the blocks it is named for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from align.config.field_descriptions import reachable_models
from align.config.recipe.recipe import Recipe
from align.config.runtime import Runtime
from align.config.stages.inputs import DataConfig, ModelConfig
from align.config.synonyms import SYNONYMS, Synonym, find_synonym, has_field
from align.config.validation import validate
from align.errors import UserError
from align.pipeline.pipeline import Pipeline, PipelineConfig
from align.pipeline.registry import STAGES

CONFIGS = {kind: stage.config_class() for kind, stage in STAGES.items()}
ROOTS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "recipe": Recipe,
    "pipeline": PipelineConfig,
    "runtime": Runtime,
}


def refusal(kind: str, block: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        validate(CONFIGS[kind], block, f"p.yaml: stages.{kind}")
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "block", "answer"),
    [
        ("sft", {"method": "dora"}, "unknown key 'method'. In align this is 'tuning.method'. Write `tuning: {method:"),
        ("sft", {"tuning": {"method": "dora"}}, "unknown value 'dora'. DoRA is `{method: lora, dora: true}`."),
        ("sft", {"tuning": "lora"}, "found 'lora'. Write `tuning: {method: lora}`."),
        ("sft", {"tuning": "dora"}, "found 'dora'. DoRA is `{method: lora, dora: true}`."),
        ("model", {"trust_remote_code": "yes"}, "should be true or false; found 'yes', which is text. Write `true`."),
        (
            "grpo",
            {"select": {"easy": 0.9, "hard": 0.1}},
            "Leave it out: it was removed, because it showed no gain; filter",
        ),
        ("ppo", {"inoculate": "Cheat."}, "it showed no gain; subtract a penalty in `score` from responses that use"),
        ("sft", {"dataset": "alpaca_en_demo"}, "In align this is 'data'. It names a stage of kind data, which has a"),
    ],
)
def test_slip_is_answered_with_what_to_write(kind: str, block: dict[str, Any], answer: str) -> None:
    assert answer in refusal(kind, block)


@pytest.mark.parametrize("synonym", SYNONYMS, ids=lambda synonym: synonym.target)
def test_every_target_is_a_field(synonym: Synonym) -> None:
    block, _, path = synonym.target.rpartition(":")
    configs = [ROOTS[block]] if block else list(CONFIGS.values())
    assert any(has_field(path.split("."), [config]) for config in configs)


def test_targets_are_unique_and_every_name_is_answered() -> None:
    targets = [synonym.target for synonym in SYNONYMS]
    assert len(set(targets)) == len(targets)
    blocks = [model for config in [*CONFIGS.values(), *ROOTS.values()] for model in reachable_models(config)]
    for synonym in SYNONYMS:
        leaf = synonym.target.rpartition(":")[2]
        names = synonym.names
        assert len(set(names)) == len(names)
        for name in names:
            answers = [find_synonym(name, [block]) for block in dict.fromkeys(blocks) if name not in block.model_fields]
            assert any(answer is not None and f"{leaf}'" in answer for answer in answers), f"{name} -> {leaf}"


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        ("sft", "lr", "In align this is 'learning_rate'."),
        ("sft", "num_train_epochs", "In align this is 'epochs'."),
        ("ppo", "num_train_epochs", "In align this is 'updates'."),
        ("ppo", "num_ppo_epochs", "In align this is 'num_epochs'."),
        ("sft", "per_device_train_batch_size", "In align this is 'micro_batch_size'."),
        ("sft", "gradient_accumulation_steps", "In align this is 'batch_size'. It is the rows of an optimizer step"),
        ("ppo", "gradient_accumulation_steps", "In align this is 'rollout_batch'."),
        ("dpo", "lora_r", "In align this is 'tuning.rank'. Write `tuning: {method: lora, rank: …}`."),
        ("sft", "load_in_4bit", "In align this is 'tuning.quantization'. Write `tuning: {method: qlora"),
        ("sft", "sequence_len", "In align this is 'max_length'."),
        ("sft", "bf16", "In align this is 'precision'."),
        ("sft", "output_dir", "In align this is 'runtime.store' at the top of the file."),
        ("grpo", "beta", "In align this is 'kl_coef'."),
        ("distill", "beta", "In align this is 'jsd_beta'."),
        ("grpo", "num_generations", "In align this is 'samples_per_prompt'."),
        ("sample", "num_generations", "In align this is 'n'."),
        ("online_dpo", "max_completion_length", "In align this is 'max_tokens'."),
        ("grpo", "epsilon_high", "In align this is 'clip_range_high'."),
        ("ppo", "cliprange_value", "In align this is 'value_clip_range'."),
        ("ppo", "vllm_gpu_memory_utilization", "In align this is 'runtime.engine.gpu_memory' at the top of the file."),
        ("ppo", "save_steps", "In align this is 'save_updates'."),
        ("dpo", "model", "In align this is 'policy'. It names an earlier stage."),
        ("ppo", "dataset_name", "In align this is 'prompts'. It names a stage of kind data"),
        ("sft", "model_name_or_path", "In align this is 'model'."),
        ("data", "dataset_name", "In align this is 'dataset'."),
        ("data", "path", "In align this is 'dataset'."),
        ("model", "path", "In align this is 'source'."),
        ("sft", "eval_dataset", "In align this is 'test_size' of a stage of kind data. The rows that it holds out"),
        ("sft", "dataset_config_name", "In align this is 'name' of a stage of kind data."),
        ("merge", "base_model", "In align this is 'base'."),
        ("sft", "adam_beta2", "It goes under 'trainer': `trainer: {adam_beta2: …}`."),
        ("sft", "logging_steps", "Leave it out: every step is logged."),
        ("ppo", "logging_steps", "Leave it out: every update is logged."),
        ("sft", "epoch", "Did you mean 'epochs'?"),
    ],
)
def test_a_name_of_another_tool_is_answered(kind: str, name: str, answer: str) -> None:
    assert f"p.yaml: stages.{kind}: unknown key '{name}'. {answer}" in refusal(kind, {name: 1})


@pytest.mark.parametrize(("word", "value"), [("gpu", "cuda"), ("GPU", "cuda"), ("cdua", "cuda")])
def test_other_words_for_a_value_are_answered(word: str, value: str) -> None:
    with pytest.raises(UserError, match=f"Did you mean '{value}'"):
        validate(Runtime, {"device": word}, "p.yaml: runtime")


def test_a_recipe_is_answered_with_its_fields() -> None:
    with pytest.raises(UserError) as caught:
        validate(Recipe, {"datasets": [], "val_set_size": 0.1}, "r.yaml")
    assert "r.yaml: unknown key 'datasets'. In align this is 'sources'.\n" in str(caught.value)
    assert "r.yaml: unknown key 'val_set_size'. In align this is 'test_size'.\n" in str(caught.value)


def test_inside_a_block_the_answer_is_its_own_field() -> None:
    message = refusal("sft", {"tuning": {"method": "lora", "lora_r": 8, "target_modules": ["q_proj"]}})
    assert "stages.sft.tuning: unknown key 'lora_r'. In align this is 'rank'.\n" in f"{message}\n"
    assert "stages.sft.tuning: unknown key 'target_modules'. In align this is 'targets'.\n" in f"{message}\n"
    with pytest.raises(
        UserError, match=r"p.yaml: runtime: unknown key 'gpu_memory_utilization'. .*'engine.gpu_memory'"
    ):
        validate(PipelineConfig, {"runtime": {"gpu_memory_utilization": 0.5}}, "p.yaml")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("base_model", "In align this is 'source' of a stage of kind model."),
        ("datasets", "In align this is 'dataset' of a stage of kind data."),
        ("val_set_size", "In align this is 'test_size' of a stage of kind data."),
        ("micro_batch_size", "'micro_batch_size' belongs to a stage, below 'stages'."),
        ("num_epochs", "In align this is 'epochs' or 'num_epochs' of a stage, below 'stages'. The kind of the stage"),
        ("save_steps", "In align this is 'save_updates' or 'save_steps' of a stage, below 'stages'. The kind of the"),
        ("dataset", "In align this is 'dataset' of a stage of kind data."),
        ("logging_steps", "Leave it out: every step is logged, and `align report` draws the curves."),
        ("lora_r", "In align this is 'tuning.rank' of a stage, below 'stages'. Write"),
        ("wandb_project", "In align this is 'runtime.tracking.project' at the top of the file."),
        ("sed", "Did you mean 'seed'?"),
    ],
)
def test_keys_of_a_flat_file_are_answered_at_the_top(name: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(PipelineConfig, {name: 1}, "p.yaml")
    assert f"p.yaml: unknown key '{name}'. {answer}" in str(caught.value)


@pytest.mark.parametrize(
    ("head", "name", "answer"),
    [
        ({"stage": "sft"}, "save_steps", "'save_steps' belongs to a stage, below 'stages'."),
        ({"stage": "sft"}, "max_steps", "'max_steps' belongs to a stage, below 'stages'."),
        ({"stage": "rm"}, "max_samples", "In align this is 'max_rows' of a stage, below 'stages'."),
        ({"stage": "ppo"}, "max_steps", "In align this is 'updates' of a stage, below 'stages'. An update"),
        ({"stage": "ppo"}, "save_steps", "In align this is 'save_updates' of a stage, below 'stages'."),
        ({"rl": "grpo"}, "max_steps", "In align this is 'updates' of a stage, below 'stages'. An update"),
        ({"stage": "ppo"}, "logging_steps", "Leave it out: every update is logged."),
    ],
)
def test_keys_of_a_flat_file_follow_its_kind_of_stage(head: dict[str, str], name: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        Pipeline({**head, name: 1}, "p.yaml")
    assert f"p.yaml: unknown key '{name}'. {answer}" in str(caught.value)


def test_stages_at_the_top_are_answered_with_their_place() -> None:
    with pytest.raises(UserError, match=r"p.yaml: 'model', 'sft' at the top of the file; write stages below `stages:`"):
        Pipeline({"name": "p", "model": {"source": "x"}, "sft": {"model": "model"}}, "p.yaml")


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("optimizer", "In align this is 'trainer'. Write `trainer: {optim: …}`; AdamW is the default."),
        ("flash_attention", "Leave it out: transformers chooses the attention for the model and the device."),
        ("do_train", "Leave it out: the stages of the file decide what is trained."),
        ("adapter_name_or_path", "In align this is 'source' of a stage of kind model. It is the name or folder of a"),
        ("gradient_accumulation_steps", "per_device_train_batch_size × gradient_accumulation_steps × devices."),
    ],
)
def test_settings_of_other_tools_name_their_place(kind: str, name: str, answer: str) -> None:
    assert answer in refusal(kind, {name: 1})
