"""The pipelines of published results: what their heads say, and each at a reduced size on a tiny model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.data.rows import read_rows
from align.evaluation.scorecard import Scorecard
from align.store.record import read_record

FOLDER = Path("pipelines/proof")
TINY: dict[str, Any] = {"runtime.device": "cpu", "runtime.engine": {"name": "transformers"}}
TINY_MODEL = {"source": "tiny", "revision": None, "dtype": "float32"}
POLICY = {"updates": 1, "rollout_batch": 4, "samples_per_prompt": 2, "max_tokens": 8, "max_prompt_tokens": 1024}
EVALUATE = {"max_tokens": 8, "max_prompts": 4, "samples_per_prompt": 1, "bootstrap": 100}
STEPS = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 1024, "gradient_checkpointing": False}
SUMS = [{"question": f"What is {n} plus {n}?", "answer": f"Add them.\n#### {2 * n}"} for n in range(30)]
TASKS = [{"nums": [n, n + 1, 2] + [5] * (n % 2), "target": 10 + n} for n in range(30)]
SOLUTIONS = [{"query": f"Reach {n}.", "completion": f"<answer> {n} </answer>"} for n in range(30)]
TEXTS = [{"prompt": f"text number {n}"} for n in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}]}
    for n in range(30)
]
PAIRS = [
    {side: [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": text}]
     for side, text in (("chosen", f"{n}"), ("rejected", "no"))}
    for n in range(30)
]  # fmt: skip


def run_small(name: str, files: dict[str, list[dict[str, Any]]], folder: Path, **stages: dict[str, Any]) -> Any:
    """Run a pipeline with local files in place of the Hub's, a tiny model and the fields of ``stages``."""
    overrides = dict(TINY)
    for stage, fields in stages.items():
        overrides |= {f"stages.{stage}.{field}": value for field, value in fields.items()}
    for stage, records in files.items():
        file = folder / f"{stage}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        if stage == "solutions":  # a dataset in one line, without a recipe
            overrides |= {f"stages.{stage}.{field}": None for field in ("split", "test_split")}
            overrides[f"stages.{stage}.dataset"] = str(file)
        else:
            overrides[f"stages.{stage}.files"] = [str(file)]
    return Pipeline.load(FOLDER / f"{name}.yaml", overrides).run(store=folder / "store")


def first_prompt(run: Any, stage: str) -> list[dict[str, str]]:
    return read_rows(run.artifacts[stage].path / "train.parquet")[0]["prompt"]


def metrics(run: Any, stage: str) -> dict[str, Any]:
    return read_record(run.artifacts[stage].path)["metrics"]


def systems(run: Any) -> list[str]:
    return [system.name for system in Scorecard.read(run.artifacts["evaluate"].path).systems]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_head_names_figure_source_cost_and_state(path: Path) -> None:
    head = path.read_text().partition("\nname:")[0]
    assert all(word in head for word in ("# Expected:", "# Source:", "# Cost:", "Not run on a GPU yet."))


def test_settings_in_the_head_of_reverse_text_are_accepted(tmp_path: Path) -> None:
    path = FOLDER / "g8_reverse_text.yaml"
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    head = " ".join(lines)
    words = shlex.split(head.partition("pinned to no commit: ")[2].partition(" With verifiers")[0])
    file = tmp_path / "paragraphs.jsonl"
    file.write_text(json.dumps({"prompt": "ab", "completion": "ba"}) + "\n")
    settings = [word.replace("willcb/R1-reverse-wikipedia-paragraphs-v1-1000", str(file)) for word in words[1::2]]
    nodes = Pipeline.load(path, settings).nodes
    assert nodes["grpo"].config.policy == "sft" and nodes["sft"].config.max_steps == 100
    assert nodes["evaluate"].config.policies == ["base", "model", "grpo", "sft"]


@pytest.mark.usefixtures("stages_in_process")
class TestReducedRuns:
    @pytest.mark.parametrize("name", ["g1_gsm8k", pytest.param("g2_gsm8k", marks=pytest.mark.slow)])
    def test_gsm8k_learns_and_scores_by_the_strict_rule(self, name: str, tmp_path: Path) -> None:
        run = run_small(name, {"data": SUMS}, tmp_path, model=TINY_MODEL, grpo=POLICY, evaluate=EVALUATE)
        assert first_prompt(run, "data")[-1]["content"].endswith('output the final answer after "####".')
        assert metrics(run, "grpo")["updates"] == 1
        assert Scorecard.read(run.artifacts["evaluate"].path).primary == "gsm8k_strict"
        assert systems(run) == ["model", "grpo"]

    def test_countdown_learns_from_solutions_then_scores(self, tmp_path: Path) -> None:
        files = {"solutions": SOLUTIONS, "tasks": TASKS}
        run = run_small("g4_countdown", files, tmp_path, model=TINY_MODEL, sft=STEPS, rloo=POLICY, evaluate=EVALUATE)
        system, user = first_prompt(run, "tasks")
        assert system["content"] == "You are a helpful assistant."
        assert "create an equation that equals" in user["content"] and " \\" not in user["content"]
        assert metrics(run, "rloo")["updates"] == 1
        assert Scorecard.read(run.artifacts["evaluate"].path).primary == "countdown"

    def test_tulu3_trains_on_the_template_of_the_source(self, tmp_path: Path) -> None:
        run = run_small("g5_tulu3", {"data": CHATS}, tmp_path, model=TINY_MODEL, data={"max_rows": 30}, sft=STEPS)
        assert metrics(run, "sft")["test_loss_after"] > 0

    def test_reward_model_reports_held_out_accuracy(self, tmp_path: Path) -> None:
        run = run_small("g6_ultrafeedback", {"data": PAIRS}, tmp_path, model=TINY_MODEL, reward=STEPS)
        assert 0 <= metrics(run, "reward")["test_accuracy_after"] <= 1

    def test_reverse_text_compares_three_checkpoints(self, tmp_path: Path) -> None:
        stages = {"base": TINY_MODEL, "model": TINY_MODEL, "grpo": POLICY, "evaluate": EVALUATE}
        run = run_small("g8_reverse_text", {"texts": TEXTS}, tmp_path, **stages)
        assert first_prompt(run, "texts")[0]["content"].startswith("Reverse the text")
        assert systems(run) == ["base", "model", "grpo"]
