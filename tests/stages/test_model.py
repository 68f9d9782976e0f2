"""Stage model: special tokens settled, base models refused by name of the field, nothing fetched when offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from align.config.runtime import Runtime
from align.config.stages.inputs import ModelConfig
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.stages.model import identities, pinned, run
from tests.support.chat_templates import THINKING
from tests.support.models.adapters import train_adapter
from tests.support.refusals import Refused


def _context(tmp_path: Path, **config: Any) -> StageContext:
    for name in ("output", "checkpoints"):
        (tmp_path / name).mkdir()
    return StageContext(
        name="model",
        config=ModelConfig(**config),
        inputs={},
        seed=3,
        runtime=Runtime(),
        output=tmp_path / "output",
        checkpoints=tmp_path / "checkpoints",
        events=tmp_path / "events.jsonl",
    )


def _edited(tiny_model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the tiny model whose tokenizer has attributes changed."""
    load_policy(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    if changes.get("chat_template", "") is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def test_tiny(tmp_path: Path) -> None:
    metrics = run(_context(tmp_path, source="tiny"))
    assert metrics["eos"] == "<|im_end|>"
    assert metrics["vocabulary"] == 260
    assert load_policy(tmp_path / "output" / "model").dtype == torch.float32


def test_wrong_eos_and_pad_are_put_right_and_said(tiny_model: Path, tmp_path: Path) -> None:
    source = _edited(tiny_model, tmp_path / "source", eos_token="<|im_start|>", pad_token="<|im_end|>")
    context = _context(tmp_path, source=str(source))
    run(context)
    tokenizer = load_tokenizer(context.output / "model")
    model = load_policy(context.output / "model")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert "ends turns with '<|im_end|>'" in context.events.read_text()


def test_base_model_without_template_is_refused_or_given_one(
    refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    source = _edited(tiny_model, tmp_path / "source", chat_template=None)
    (tmp_path / "one").mkdir()
    refused(lambda: run(_context(tmp_path / "one", source=str(source))))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    (tmp_path / "two").mkdir()
    context = _context(tmp_path / "two", source=str(source), chat_template=str(template))
    run(context)
    assert load_tokenizer(context.output / "model").chat_template == template.read_text()


def test_bfloat16_is_stored_and_missing_template_is_refused(refused: Refused, tmp_path: Path) -> None:
    context = _context(tmp_path, source="tiny", dtype="bfloat16")
    run(context)
    assert load_policy(context.output / "model", torch.bfloat16).dtype == torch.bfloat16
    refused(lambda: identities(ModelConfig(source="tiny", chat_template="nowhere.jinja"), tmp_path))


def test_unreachable_hub_is_one_message(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    refused(lambda: run(_context(tmp_path, source="a/b", revision="0" * 40)))


def test_a_network_that_fails_is_one_message(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    refused(lambda: run(_context(tmp_path, source="a/b", revision="0" * 40)))


def _with_code(tiny_model: Path, folder: Path, kind: str) -> Path:
    """A copy of the tiny model that brings a class of its own for its type, ``kind``."""
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"class OwnConfig(LlamaConfig):\n    model_type = {kind!r}\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n    ran = True\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": kind,
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def code_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a model's code into a folder of its own before it runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.usefixtures("code_of_models")
def test_code_that_is_trusted_does_not_go_into_the_store(tiny_model: Path, tmp_path: Path) -> None:
    source = _with_code(tiny_model, tmp_path / "source", "llama")
    context = _context(tmp_path, source=str(source), trust_remote_code=True)
    run(context)
    assert not list((context.output / "model").glob("*.py"))
    assert "auto_map" not in (context.output / "model" / "config.json").read_text()
    assert type(load_policy(context.output / "model")).__name__ == "LlamaForCausalLM"


@pytest.mark.usefixtures("code_of_models")
def test_the_code_of_an_adapters_base_runs_where_it_is_trusted(
    refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = str(train_adapter(tiny_model, tmp_path / "lora"))
    base = str(_with_code(tiny_model, tmp_path / "base", "own-kind"))
    for name, trusted in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        refused(run, _context(tmp_path / name, source=adapter, base_model=base, trust_remote_code=trusted))
    (tmp_path / "three").mkdir()
    known = _with_code(tiny_model, tmp_path / "known", "llama")
    plain = _context(tmp_path / "three", source=adapter, base_model=str(known), trust_remote_code=True)
    run(plain)
    assert not list((plain.output / "model").glob("*.py"))
    assert type(load_policy(plain.output / "model")).__name__ == "LlamaForCausalLM"


@pytest.mark.usefixtures("code_of_models")
def test_a_model_that_is_its_own_code_alone_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    source = _with_code(tiny_model, tmp_path / "source", "own-kind")
    for name, trusted in (("one", False), ("two", True)):
        (tmp_path / name).mkdir()
        refused(run, _context(tmp_path / name, source=str(source), trust_remote_code=trusted))
    assert (tmp_path / "modules").exists()  # it was run where that was allowed


def test_template_that_replaces_the_models_own_warns(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, source=str(tiny_model), chat_template="alpaca")
    run(context)
    assert "chat_template: alpaca replaces the chat template of" in context.events.read_text()


def test_thinking_switch_is_stored_in_checkpoint(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    source = str(_edited(tiny_model, tmp_path / "source", chat_template=THINKING))
    metrics = run(_context(tmp_path, source=source, thinking=False))
    assert metrics["chat_template_kwargs"] == '{"enable_thinking": false}'
    tokenizer = load_tokenizer(tmp_path / "output" / "model")
    prompt = tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "Why?"}]))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    refused(lambda: pinned(ModelConfig(source=source, chat_template="chatml", thinking="on"), tmp_path))
    refused(lambda: pinned(ModelConfig(source=source, chat_template_kwargs={"enable_thinkin": True}), tmp_path))
