"""Warnings of a plan about settings, from files on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.runner.plan import plan
from align.store.store import Store

PPO = {"policy": "sft", "prompts": "data", "score": "gold", "learning_rate": 1e-5, "updates": 2}
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
        "evaluate": {"policies": ["sft", "ppo"], "reference": "sft", "prompts": "data", "max_tokens": 64},
    }
    pipeline = Pipeline({"name": "run", "seed": 1, "stages": stages})
    return " ".join(next(step.notes for step in plan(pipeline, store) if step.node.name == stage))


def test_max_tokens_without_room_for_a_prompt_is_a_warning(store: Store) -> None:
    text = "max_tokens 100000 leaves no room for a prompt in the 2048 positions of 'tiny' (stage 'model')"
    assert text in notes(store, "ppo", {"source": "tiny"}, max_tokens=100_000)
    assert notes(store, "ppo", {"source": "tiny"}, max_tokens=512) == ""
    assert notes(store, "evaluate", {"source": "tiny"}) == ""


def test_context_of_a_local_model_counts(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    assert "in the 300 positions of" in notes(store, "ppo", {"source": str(folder)}, max_tokens=512)
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
