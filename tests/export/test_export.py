"""An export holds the checkpoint's weights: adapters merged as applied, types as asked for, nothing unsafe read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from align.config.tuning import LoraTuning
from align.export.export import Source, export, load_source, round_weights, stored_type
from align.models.checkpoints.conversion import attach
from align.models.checkpoints.files import ADAPTER_CONFIG
from align.models.loading import load_policy, load_reward, load_tokenizer, new_reward
from align.models.tuning.apply import apply_tuning, save_tuned
from tests.support.refusals import Refused

IDS = torch.tensor([[1, 40, 41, 42, 2, 1, 50, 60, 70, 80]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        values |= load_file(file)
    return values


@torch.no_grad()
def stirred(model: Any) -> Any:
    """The adapters' matrices that start at zero, moved, so that a lost adapter shows."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
        assert "lora_" in name or not weight.requires_grad or "score" in name or "ia3" in name or "prompt" in name
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """What a training stage leaves: ``model/``, merged, and ``adapter/`` beside it."""
    folder = tmp_path_factory.mktemp("trained")
    model = stirred(apply_tuning(load_policy(tiny_model), LoraTuning(rank=4, alpha=8), seed=1))
    save_tuned(model, load_tokenizer(tiny_model), folder / "model")
    return folder


def peft_adapter(folder: Path, base: Path, config: Any) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and what the model answers with it beside the base."""
    torch.manual_seed(0)
    model = stirred(get_peft_model(load_policy(base), config))
    model.save_pretrained(str(folder))
    return folder, logits(model)


def test_a_checkpoint_is_written_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    written = export(Source(tiny_model), tmp_path / "out")
    assert (written.is_reward, written.dtype, written.architecture) == (False, "float32", "LlamaForCausalLM")
    assert written.parameters == sum(p.numel() for p in load_policy(tiny_model).parameters())
    exported, theirs = weights(tmp_path / "out"), weights(tiny_model)
    assert exported.keys() == theirs.keys() and all(torch.equal(exported[name], theirs[name]) for name in exported)
    assert set(written.files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (ends["eos_token_id"], ends["pad_token_id"]) == (2, 3)
    texts = [file.read_text() for file in (tmp_path / "out").glob("*.json")]
    assert not [text for text in texts if str(tiny_model) in text], "where it lay is nobody's business"


def test_bfloat16_halves_weights_and_second_export_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    written = export(Source(tiny_model), tmp_path / "out", "bfloat16")
    exported, theirs = weights(tmp_path / "out"), weights(tiny_model)
    assert written.dtype == "bfloat16" and {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(exported[name], theirs[name].bfloat16()) for name in exported)
    assert stored_type(tmp_path / "out") == "bfloat16"
    assert export(Source(tmp_path / "out"), tmp_path / "again").dtype == "bfloat16"


def test_large_weights_are_split_with_an_index(tiny_model: Path, tmp_path: Path) -> None:
    export(Source(tiny_model), tmp_path / "out", shard="100KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(logits(load_policy(tmp_path / "out")), logits(load_policy(tiny_model)))


def test_an_adapter_is_merged_as_training_merged_it(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    export(Source(tiny_model, trained / "adapter"), tmp_path / "out")
    exported, theirs = weights(tmp_path / "out"), weights(trained / "model")
    assert exported.keys() == theirs.keys() and all(torch.equal(exported[name], theirs[name]) for name in exported)
    assert not torch.equal(exported["model.layers.0.mlp.up_proj.weight"],
                           weights(tiny_model)["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type=TaskType.CAUSAL_LM),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True, task_type=TaskType.CAUSAL_LM),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["dora", "rslora", "ia3"],
)
def test_adapters_of_other_trainers_merge_too(config: Any, tiny_model: Path, tmp_path: Path) -> None:
    adapter, answered = peft_adapter(tmp_path / "adapter", tiny_model, config)
    export(Source(tiny_model, adapter), tmp_path / "out")
    assert torch.allclose(logits(load_policy(tmp_path / "out")), answered, atol=1e-4)
    assert not torch.allclose(logits(load_policy(tiny_model)), answered, atol=1e-2)


def test_an_adapter_beside_its_base_answers_as_the_merged_one(trained: Path, tiny_model: Path) -> None:
    adapter_model = attach(load_policy(tiny_model), trained / "adapter", merge=False)
    assert type(adapter_model).__name__ == "PeftModelForCausalLM"
    assert torch.allclose(logits(adapter_model), logits(load_policy(trained / "model")), atol=1e-4)


def test_a_reward_model_stays_a_classifier(tiny_reward: Path, tmp_path: Path) -> None:
    written = export(Source(tiny_reward), tmp_path / "out")
    assert written.is_reward and written.architecture == "LlamaForSequenceClassification"
    assert torch.equal(logits(load_reward(tmp_path / "out")), logits(load_reward(tiny_reward)))


def test_a_reward_model_s_adapter_brings_its_head(tiny_model: Path, tmp_path: Path) -> None:
    model = stirred(apply_tuning(new_reward(tiny_model), LoraTuning(rank=4, alpha=8), seed=1))
    save_tuned(model, load_tokenizer(tiny_model), tmp_path / "model")
    source = Source(tiny_model, tmp_path / "adapter")
    assert source.is_reward()
    assert export(source, tmp_path / "out").is_reward
    scores = logits(load_reward(tmp_path / "out"))
    assert torch.equal(scores, logits(load_reward(tmp_path / "model"))) and scores.abs().min() > 0


def test_an_adapter_s_own_tokenizer_is_taken(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "answerer")
    tokenizer.save_pretrained(adapter)
    export(Source(tiny_model, adapter), tmp_path / "out")
    assert "answerer" in load_tokenizer(tmp_path / "out").chat_template


def test_rounding_weights_leaves_what_is_no_weight(tiny_model: Path) -> None:
    model, plain = load_policy(tiny_model), load_policy(tiny_model)
    round_weights(model, "bfloat16")
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    exported, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(exported[name], theirs[name].bfloat16().float()) for name in exported)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


# ---- what is refused ------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoilt(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "harm",
    [
        only_pickles,
        lambda folder: change(folder / "config.json", quantization_config={"bits": 4}),
        lambda folder: change(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
        lambda folder: change(folder / "config.json", model_type="nothing"),
        lambda folder: (folder / "config.json").write_text("[1]"),
        spoilt,
        lacking,
        lambda folder: (folder / "chat_template.jinja").unlink(),
    ],
    ids=["pickles", "quantized", "code", "unknown", "config", "nan", "lacking", "template"],
)
def test_a_checkpoint_that_is_unsafe_or_damaged_is_refused(
    refused: Refused, harm: Callable[[Path], Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_model, tmp_path / "model")
    harm(folder)
    refused(lambda: export(Source(folder), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def half_an_adapter(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    remaining = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(remaining, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_of_more(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    more = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name
    }
    save_file(tensors | more, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "harm",
    [
        pickled_adapter,
        half_an_adapter,
        adapter_of_more,
        lambda folder: change(folder / ADAPTER_CONFIG, r=8),
        lambda folder: change(folder / ADAPTER_CONFIG, target_modules=["no_such_module"]),
    ],
    ids=["pickles", "half", "more", "rank", "modules"],
)
def test_an_adapter_that_is_unsafe_or_does_not_fit_is_refused(
    refused: Refused, harm: Callable[[Path], Any], trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = copy(trained / "adapter", tmp_path / "adapter")
    harm(adapter)
    refused(lambda: export(Source(tiny_model, adapter), tmp_path / "out"))


def test_prompt_tuning_is_no_change_of_weights(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM)
    adapter, _ = peft_adapter(tmp_path / "adapter", tiny_model, config)
    refused(lambda: export(Source(tiny_model, adapter), tmp_path / "out"))


def test_tokenizer_with_more_tokens_than_base_is_refused(
    refused: Refused, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = copy(trained / "adapter", tmp_path / "adapter")
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    refused(lambda: export(Source(tiny_model, adapter), tmp_path / "out"))


def test_loading_draws_nothing_from_the_caller_s_randomness(trained: Path, tiny_model: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_source(Source(tiny_model, trained / "adapter"))
    assert torch.equal(torch.rand(3), expected)
