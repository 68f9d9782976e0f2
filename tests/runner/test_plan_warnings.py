"""Warnings of a plan about settings, from files on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.runner.plan import plan
from align.store.store import Store
from tests.support.chat_templates import THINKING
from tests.support.refusals import Refused

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


def test_max_tokens_without_room_for_a_prompt_is_refused(refused: Refused, store: Store) -> None:
    refused(notes, store, "ppo", {"source": "tiny"}, max_tokens=100000)
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
def test_template_without_switch_is_refused(
    refused: Refused, place: str, store: Store, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_model, tmp_path)
    stages: dict[str, dict[str, Any]] = {
        "model": {"source": str(folder)},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "evaluate": {"policies": ["model"], "reference": "model", "prompts": "data"},
    }
    stages[place]["thinking"] = "off"
    refused(lambda: plan(Pipeline({"name": "run", "seed": 1, "stages": stages}), store))
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
def test_template_without_tools_is_refused(refused: Refused, model: dict[str, Any], store: Store) -> None:
    refused(notes, store, "ppo", model, environment=CALCULATOR, score=None)
    assert notes(store, "ppo", {**model, "chat_template": "chatml-tools"}, environment=CALCULATOR, score=None) == ""


def test_template_without_results_is_refused(refused: Refused, store: Store, tmp_path: Path) -> None:
    file = tmp_path / "calls.jinja"
    file.write_text(
        "{{ tools | tojson if tools else '' }}{% for message in messages if message.role != 'tool' %}"
        "<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>{% endfor %}"
    )
    refused(
        lambda: notes(store, "ppo", {"source": "tiny", "chat_template": str(file)}, environment=CALCULATOR, score=None)
    )


def test_task_with_tools_needs_a_template_for_them(refused: Refused, store: Store) -> None:
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
    refused(plan, pipeline, store)


def test_tool_template_of_a_tokenizer_counts(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path)
    (folder / "additional_chat_templates").mkdir()
    text = (Path("align/models/chat/templates") / "chatml-tools.jinja").read_text()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    assert notes(store, "ppo", {"source": str(folder)}, environment=CALCULATOR, score=None) == ""


def test_reported_rows_are_refused_during_training(
    refused: Refused, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sum_ in (("dev", 2), ("test", 3), ("copy", 3)):
        record = {"question": f"{sum_ - 1} + 1", "answer": f"#### {sum_}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def evaluated(name: str) -> str:
        tasks = {"gsm8k": {"files": [str(tmp_path / f"{name}.jsonl")]}}
        return notes(store, "ppo", {"source": "tiny"}, evaluate={"every": 1, "tasks": tasks})

    monkeypatch.setitem(EVALUATE, "tasks", {"sums": {"task": "gsm8k", "files": [str(tmp_path / "test.jsonl")]}})
    assert evaluated("dev") == ""
    refused(evaluated, "copy")


# ---- scores, and settings without effect ----

SUMS = [{"prompt": f"What is {i}+{i}?", "completion": f"It is {2 * i}.", "total": str(2 * i)} for i in range(1, 41)]
GRPO = {"policy": "model", "prompts": "data", "updates": 2, "learning_rate": 1e-5}
MODULE = "tests.support.stages.broken_rewards"


def score_notes(store: Store, folder: Path, score: Any, records: Any = SUMS, **fields: Any) -> str:
    """Return the notes of a planned stage whose dataset is a file that was not built yet."""
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"dataset": str(file), "keep": ["total"]}
    stages = {"model": {"source": "tiny"}, "data": data, "grpo": {**GRPO, "score": score, **fields}}
    pipeline = Pipeline({"name": "run", "seed": 1, "stages": stages})
    return " ".join(next(step.notes for step in plan(pipeline, store) if step.node.name == "grpo"))


@pytest.mark.parametrize(
    "score",
    [
        [{"number": "totl"}],
        [{"code": "tests"}],
        [{"choice": "total"}],
        f"{MODULE}:constant",
    ],
)
def test_score_that_the_stage_refuses_is_refused(refused: Refused, score: Any, store: Store, tmp_path: Path) -> None:
    refused(score_notes, store, tmp_path, score)


def test_good_score_is_planned_without_a_note(store: Store, tmp_path: Path) -> None:
    assert score_notes(store, tmp_path, [{"number": "total"}]) == ""
    assert score_notes(store, tmp_path, f"{MODULE}:constant", score_validation={"floor": 0.0}) == ""


def test_expensive_score_is_planned_with_the_command(store: Store, tmp_path: Path) -> None:
    judge = {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    text = score_notes(store, tmp_path, [{"number": "total"}, {"judge": judge}])
    assert "once `align run pipeline --only data` has made its rows" in text
    assert "`align score pipeline:data --with pipeline:grpo --validate` does it at once" in text


def test_metric_column_of_an_evaluation_is_checked(refused: Refused, store: Store, tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in SUMS))
    evaluate = {"policies": ["model"], "reference": "model", "prompts": "data", "metrics": [{"number": "totl"}]}
    data = {"dataset": str(tmp_path / "sums.jsonl"), "keep": ["total"]}
    stages = {"model": {"source": "tiny"}, "data": data, "evaluate": evaluate}
    refused(lambda: plan(Pipeline({"name": "run", "seed": 1, "stages": stages}), store))


def test_plan_of_a_validated_score_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in SUMS))
    data = {"dataset": "sums.jsonl", "keep": ["total"]}
    grpo = {**GRPO, "score": [{"number": "total"}], "tuning": {"method": "lora"}, "thinking_budget": 8}
    stages = {"model": {"source": "tiny"}, "data": data, "grpo": grpo}
    (tmp_path / "p.yaml").write_text(json.dumps({"name": "p", "stages": stages}))
    code = "import sys; from align.cli.main import main; main(['plan', 'p.yaml']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("targets", [["q_porj"], ["mlp.up_prj"], ["query"]])
def test_unknown_module_is_refused_with_the_nearest(refused: Refused, targets: list[str], store: Store) -> None:
    refused(notes, store, "ppo", {"source": "tiny"}, tuning={"method": "lora", "targets": targets})


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "model.embed_tokens"]])
def test_adapters_on_a_tied_head_are_refused(refused: Refused, targets: list[str], store: Store) -> None:
    tuning = {"method": "lora", "targets": targets}
    refused(notes, store, "ppo", {"source": "tiny"}, tuning=tuning)
    # A reward model has no such head.
    stages = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "reward": {"model": "model", "data": "data", "objective": "regression", "learning_rate": 1e-3}
        | {"max_steps": 6, "tuning": {"method": "lora", "targets": ["embed_tokens"]}},
    }
    plan(Pipeline({"name": "run", "seed": 1, "stages": stages}), store)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_quantized_model_is_refused(
    refused: Refused, method: str, tiny_model: Path, tmp_path: Path, store: Store
) -> None:
    folder = copy_of(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    refused(lambda: notes(store, "model", {"source": str(folder)}))


def test_known_modules_are_planned_without_a_note(refused: Refused, store: Store) -> None:
    tuning = {"method": "lora", "targets": ["q_proj", "mlp.up_proj"], "save_modules": ["embed_tokens"]}
    assert notes(store, "ppo", {"source": "tiny"}, tuning=tuning) == ""
    refused(notes, store, "ppo", {"source": "tiny"}, tuning={**tuning, "save_modules": ["embed_tokns"]})


def test_settings_without_effect_are_a_warning(store: Store, tmp_path: Path, tiny_model: Path) -> None:
    text = notes(store, "ppo", {"source": "tiny"}, eval_updates=3, thinking_budget=8)
    assert "eval_updates 3 is beyond the end at updates 2" in text
    assert "thinking_budget has no effect unless" in text and "the chat template of 'tiny'" in text
    folder = copy_of(tiny_model, tmp_path)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    assert notes(store, "ppo", {"source": str(folder)}, eval_updates=2, thinking_budget=8) == ""
