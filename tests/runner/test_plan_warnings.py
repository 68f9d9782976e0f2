"""Warnings of a plan about settings, from files on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import UserError
from align.runner.plan import plan
from align.store.store import Store
from tests.support.chat_templates import THINKING

PPO = {"policy": "sft", "prompts": "data", "score": "gold", "learning_rate": 1e-5, "updates": 2}
EVALUATE = {"policies": ["sft", "ppo"], "reference": "sft", "prompts": "data", "max_tokens": 64}
SFT = {"model": "model", "data": "data", "learning_rate": 1e-3, "max_steps": 6}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def notes(store: Store, stage: str, model: dict[str, Any], **ppo: Any) -> str:
    stages = {
        "model": model,
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "sft": SFT,
        "ppo": {**PPO, **ppo},
        "evaluate": EVALUATE,
    }
    pipeline = Pipeline({"name": "run", "seed": 1, "stages": stages})
    return " ".join(next(step.notes for step in plan(pipeline, store) if step.node.name == stage))


def test_max_tokens_without_room_for_a_prompt_is_refused(store: Store) -> None:
    text = "max_tokens: 100000 leaves no room for a prompt in the 2048 positions of 'tiny' [(]stage 'model'[)]"
    with pytest.raises(UserError, match=f"^stages.ppo.{text}"):
        notes(store, "ppo", {"source": "tiny"}, max_tokens=100_000)
    assert notes(store, "ppo", {"source": "tiny"}, max_tokens=512) == ""
    assert notes(store, "evaluate", {"source": "tiny"}) == ""


def test_sequences_beyond_the_context_are_a_warning(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1100}))
    text = "max_prompt_tokens 1024 and max_tokens 128 are more than the 1100 positions of"
    assert text in notes(store, "ppo", {"source": str(folder)}, max_tokens=128)
    assert notes(store, "evaluate", {"source": str(folder)}) == ""


@pytest.mark.parametrize(
    ("template", "is_replaced"), [("alpaca", True), ("vicuna", True), ("chatml", False), (None, False)]
)
def test_template_with_other_turns_is_a_warning(
    template: str | None, is_replaced: bool, store: Store, tiny_model: Path
) -> None:
    text = notes(store, "model", {"source": str(tiny_model), "chat_template": template})
    assert (f"chat_template: {template} replaces the chat template of '{tiny_model}'" in text) is is_replaced
    assert ("Remove chat_template to keep its own." in text) is is_replaced


def test_other_turns_for_the_embedded_model_are_a_warning(store: Store) -> None:
    assert "instead of" in notes(store, "model", {"source": "smollm2-135m-instruct", "chat_template": "alpaca"})
    assert notes(store, "model", {"source": "smollm2-135m-instruct", "chat_template": "chatml"}) == ""


@pytest.mark.parametrize("place", ["model", "evaluate"])
def test_template_without_switch_is_refused(place: str, store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    stages: dict[str, dict[str, Any]] = {
        "model": {"source": str(folder)},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "evaluate": {"policies": ["model"], "reference": "model", "prompts": "data"},
    }
    stages[place]["thinking"] = "off"
    with pytest.raises(UserError, match=rf"stages\.{place}(\.|: )thinking: the chat template has no switch"):
        plan(Pipeline({"name": "run", "seed": 1, "stages": stages}), store)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    plan(Pipeline({"name": "run", "seed": 1, "stages": stages}), store)


def test_template_of_a_base_model_replaces_none(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert notes(store, "model", {"source": str(folder), "chat_template": "alpaca"}) == ""


def copy_of(model: Path, folder: Path) -> Path:
    """Copy a model's folder, to edit its small files."""
    copy = folder / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


CALCULATOR = {"class": "examples.calculator:Calculator", "max_tokens": 64}


@pytest.mark.parametrize("model", [{"source": "smollm2-135m-instruct"}, {"source": "tiny"}])
def test_template_without_tools_is_refused(model: dict[str, Any], store: Store) -> None:
    with pytest.raises(UserError, match="no place for tools, and the environment has calculate") as error:
        notes(store, "ppo", model, environment=CALCULATOR, score=None)
    assert str(error.value).startswith("stages.ppo.environment: stage 'model': the chat template has")
    assert "one of align's that fits its tokens (chatml-tools, qwen2.5)" in str(error.value)
    assert notes(store, "ppo", {**model, "chat_template": "chatml-tools"}, environment=CALCULATOR, score=None) == ""


def test_template_without_results_is_refused(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "calls.jinja"
    file.write_text(
        "{{ tools | tojson if tools else '' }}{% for message in messages if message.role != 'tool' %}"
        "<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UserError, match="no place for the results of tools"):
        notes(store, "ppo", {"source": "tiny", "chat_template": str(file)}, environment=CALCULATOR, score=None)


def test_task_with_tools_needs_a_template_for_them(store: Store) -> None:
    stages = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/calculator.yaml"},
        "evaluate": {
            "policies": ["model"],
            "prompts": "data",
            "reference": "model",
            "max_tokens": 64,
            "rows": ["data"],
            "tasks": {"sums": {"task": "environment", "environment": CALCULATOR, "rows": "data"}},
        },
    }
    pipeline = Pipeline({"name": "run", "seed": 1, "stages": stages})
    with pytest.raises(UserError, match=r"stages.evaluate.tasks.sums.environment: stage 'model': the chat template"):
        plan(pipeline, store)


def test_tool_template_of_a_tokenizer_counts(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    (folder / "additional_chat_templates").mkdir()
    text = (Path("align/models/chat/templates") / "chatml-tools.jinja").read_text()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    assert notes(store, "ppo", {"source": str(folder)}, environment=CALCULATOR, score=None) == ""


def test_reported_rows_are_refused_during_training(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sum_ in (("dev", 2), ("test", 3), ("copy", 3)):
        record = {"question": f"{sum_ - 1} + 1", "answer": f"#### {sum_}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def evaluated(name: str) -> str:
        tasks = {"gsm8k": {"files": [str(tmp_path / f"{name}.jsonl")]}}
        return notes(store, "ppo", {"source": "tiny"}, evaluate={"every": 1, "tasks": tasks})

    monkeypatch.setitem(EVALUATE, "tasks", {"sums": {"task": "gsm8k", "files": [str(tmp_path / "test.jsonl")]}})
    assert evaluated("dev") == ""
    with pytest.raises(UserError, match=r"stages.ppo.evaluate.tasks.gsm8k: stage 'evaluate' reports .*copy.jsonl"):
        evaluated("copy")
