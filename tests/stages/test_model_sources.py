"""Stage model on what others made: adapters, names on the Hub, checkpoints of DeepSpeed and FSDP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config.runtime import Runtime
from align.config.stages.inputs import ModelConfig
from align.models.built_in import make_tiny
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.pipeline import Pipeline
from align.stages.model import architecture, identities, pinned, run
from tests.support.hub_server import HubServer, online_hub
from tests.support.models.adapters import train_adapter
from tests.support.refusals import Refused

__all__ = ["online_hub"]


def bring_in(folder: Path, **fields: Any) -> StageContext:
    """Run the stage with its config pinned, as a pipeline does."""
    for name in ("output", "checkpoints"):
        (folder / name).mkdir(parents=True)
    config = pinned(ModelConfig(**fields), Path.cwd())
    context = StageContext(
        name="model",
        config=config,
        inputs={},
        seed=3,
        runtime=Runtime(),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )
    run(context)
    return context


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "lora")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 260)[None]).logits


def test_an_adapter_of_trl_is_merged_into_its_base(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    context = bring_in(tmp_path, source=str(adapter))
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter))
    torch.testing.assert_close(logits(load_policy(context.output / "model")), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(load_policy(tiny_model)), atol=1e-3)  # it was trained
    assert context.config.base_model == str(tiny_model)
    digests = identities(context.config, tmp_path)
    assert digests["source"].startswith("adapter:") and digests["base_model"].startswith("folder:")
    assert architecture(context.config, tmp_path).hidden == 64


def test_the_merge_is_in_float32_also_for_a_model_in_bfloat16(adapter: Path, tmp_path: Path) -> None:
    rounded = bring_in(tmp_path / "a", source=str(adapter), dtype="bfloat16").output / "model"
    model = load_policy(rounded, torch.bfloat16)
    whole = load_policy(bring_in(tmp_path / "b", source=str(adapter)).output / "model")
    for (name, weight), (_, exact) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(weight, exact.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [260, 261]},
    ],
)
def test_tokens_that_the_adapter_was_trained_with_get_their_rows(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|end_of_tool|>"]})
    folder = train_adapter(tiny_model, tmp_path / "lora", tokenizer, resized=True, **lora)
    output = bring_in(tmp_path, source=str(folder)).output / "model"
    model = load_policy(output)
    assert model.get_input_embeddings().weight.shape[0] == 262 == len(load_tokenizer(output))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(262, mean_resizing=False)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(base, folder)), rtol=1e-5, atol=1e-5)


def test_adapter_on_tied_embedding_does_not_change_the_head(tiny_model: Path, tmp_path: Path) -> None:
    folder = train_adapter(tiny_model, tmp_path / "lora", target_modules=["q_proj", "embed_tokens"])
    output = bring_in(tmp_path, source=str(folder)).output / "model"
    model, base = load_policy(output), AutoModelForCausalLM.from_pretrained(tiny_model)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, base.get_output_embeddings().weight)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(base, folder)), rtol=1e-5, atol=1e-5)


def test_the_template_is_the_adapters_else_its_bases(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "own")
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    output = bring_in(tmp_path / "a", source=str(own)).output
    assert load_tokenizer(output / "model").chat_template == (own / "chat_template.jinja").read_text()
    (own / "chat_template.jinja").unlink()
    output = bring_in(tmp_path / "b", source=str(own)).output
    assert load_tokenizer(output / "model").chat_template == load_tokenizer(tiny_model).chat_template


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_without_its_base_is_refused_when_planned(
    refused: Refused, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(adapter, tmp_path / "moved")
    edit(moved, base_model_name_or_path="/old/base")
    refused(lambda: pinned(ModelConfig(source=str(moved)), tmp_path))
    assert pinned(ModelConfig(source=str(moved), base_model=str(tiny_model)), tmp_path).base_model == str(tiny_model)
    edit(moved, base_model_name_or_path=None)
    refused(lambda: pinned(ModelConfig(source=str(moved)), tmp_path))
    edit(moved, task_type="SEQ_CLS")
    refused(lambda: pinned(ModelConfig(source=str(moved), base_model=str(tiny_model)), tmp_path))
    refused(lambda: pinned(ModelConfig(source=str(adapter), base_model=str(adapter)), tmp_path))


def test_quantized_base_of_an_adapter_is_refused_when_planned(
    refused: Refused, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "awq"}}))
    refused(lambda: pinned(ModelConfig(source=str(adapter), base_model=str(base)), tmp_path))


@pytest.mark.parametrize("fields", [{"base_model": "tiny"}, {"base_revision": "main"}])
def test_a_whole_model_has_no_base(refused: Refused, fields: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    for source in (str(tiny_model), "tiny", "smollm2-135m-instruct"):
        refused(pinned, ModelConfig(source=source, **fields), tmp_path)


def test_an_adapter_of_another_base_is_refused(refused: Refused, adapter: Path, tmp_path: Path) -> None:
    wide = make_tiny(tmp_path / "wide", hidden_size=96)
    refused(lambda: bring_in(tmp_path, source=str(adapter), base_model=str(wide)))


# --- the Hub


def test_name_without_commit_is_resolved_and_in_the_key(
    online_hub: HubServer, tiny_model: Path, tmp_path: Path
) -> None:
    first = online_hub.push_folder("models/org/tiny", tiny_model)
    stages = {"name": "x", "stages": {"model": {"source": "org/tiny"}}}
    pipeline = Pipeline(stages)
    assert pipeline.pins == {"model": {"revision": first}}
    assert pipeline.nodes["model"].identities == {"source": f"hub:org/tiny@{first}"}
    assert pipeline.resolved["stages"]["model"] == {"source": "org/tiny", "revision": first}
    written = Pipeline({"name": "x", "stages": {"model": {"source": "org/tiny", "revision": first}}})
    assert written.nodes["model"].key == pipeline.nodes["model"].key and not written.pins
    # The same process goes on with the same commit; the plain pipeline, which cluster jobs read, has it written out.
    second = online_hub.repository("models/org/tiny").commit({"config.json": b"{}"})
    assert Pipeline(stages).nodes["model"].key == pipeline.nodes["model"].key
    assert Pipeline(pipeline.plain).pins == {} and second != first
    output = bring_in(tmp_path, source="org/tiny").output / "model"
    assert torch.equal(logits(load_policy(output)), logits(load_policy(tiny_model)))


def test_branches_tags_and_what_is_not_there(refused: Refused, online_hub: HubServer, tiny_model: Path) -> None:
    commit = online_hub.push_folder("models/org/tiny", tiny_model, branch="v1.0")
    assert pinned(ModelConfig(source="org/tiny", revision="v1.0"), Path.cwd()).revision == commit
    refused(lambda: pinned(ModelConfig(source="org/tiny", revision="v2"), Path.cwd()))
    refused(lambda: pinned(ModelConfig(source="org/tyni"), Path.cwd()))


def test_offline_takes_the_cached_commit(
    refused: Refused, online_hub: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = online_hub.push_folder("models/org/tiny", tiny_model)
    bring_in(tmp_path / "online", source="org/tiny")
    online_hub.repository("models/org/tiny").commit({"config.json": b"{}"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(online_hub.requests)
    context = bring_in(tmp_path / "offline", source="org/tiny")
    assert context.config.revision == first and len(online_hub.requests) == before
    refused(lambda: pinned(ModelConfig(source="org/other"), tmp_path))


def test_a_hub_that_does_not_answer_names_the_cached_commit(
    refused: Refused, online_hub: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.hub_server import forget_hub

    online_hub.push_folder("models/org/tiny", tiny_model)
    bring_in(tmp_path, source="org/tiny")
    forget_hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: pinned(ModelConfig(source="org/tiny"), tmp_path))


def test_an_adapter_on_the_hub_with_its_base_there(
    online_hub: HubServer, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(adapter, tmp_path / "pushed")
    edit(own, base_model_name_or_path="org/base")
    adapter_commit = online_hub.push_folder("models/org/lora", own)
    base_commit = online_hub.push_folder("models/org/base", tiny_model)
    context = bring_in(tmp_path, source="org/lora")
    assert context.config.revision == adapter_commit
    assert (context.config.base_model, context.config.base_revision) == ("org/base", base_commit)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter))
    torch.testing.assert_close(logits(load_policy(context.output / "model")), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_model_on_the_hub_has_no_base(
    refused: Refused,
    online_hub: HubServer,
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    online_hub.push_folder("models/org/tiny", tiny_model)
    fields = {"source": "org/tiny", "base_model": str(tiny_model)}
    refused(lambda: pinned(ModelConfig(**fields), tmp_path))
    # An adapter with a copy of its base's config is no whole model.
    both = shutil.copytree(adapter, tmp_path / "pushed")
    shutil.copy(tiny_model / "config.json", both)
    online_hub.push_folder("models/org/lora", both)
    assert pinned(ModelConfig(source="org/lora", base_model=str(tiny_model)), tmp_path).base_model == str(tiny_model)
    # Where the plan cannot know, the stage finds out.
    monkeypatch.setattr("align.stages.model.small_file", lambda *names: None)
    refused(bring_in, tmp_path, **fields)


# --- checkpoints in shards


def test_checkpoints_of_other_tools_name_their_converter(refused: Refused, tmp_path: Path) -> None:
    deepspeed, fsdp, verl = (tmp_path / name for name in ("checkpoint-10", "fsdp run", "verl"))
    for file in (
        deepspeed / "global_step9" / "mp_rank_00_model_states.pt",
        deepspeed / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt",
        deepspeed / "config.json",
        fsdp / "pytorch_model_fsdp_0" / "__0_0.distcp",
        verl / "model_world_size_2_rank_0.pt",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{}")
    for folder in (deepspeed, deepspeed, deepspeed / "global_step10", fsdp, verl):
        refused(pinned, ModelConfig(source=str(folder)), tmp_path)


def test_the_folder_of_an_adapter_is_a_checkpoint_to_evaluate(adapter: Path) -> None:
    from align.cli.checkpoints import find_all

    (checkpoint,) = find_all([str(adapter)], None)
    assert (checkpoint.name, checkpoint.stage) == ("lora", {"stage": "model", "source": str(adapter)})
