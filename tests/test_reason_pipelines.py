"""The pipelines ``reason`` and ``verified`` at a reduced size on a tiny model, and the questions that they ask."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.validation import validate
from align.config.verifiers import EnvironmentVerifier
from align.data.rows import read_rows
from align.scoring.verifiers import open_verifier
from benchmarks.thoughts import measure
from examples import steps, verified_rows

TINY: dict[str, Any] = {
    "runtime.engine": {"name": "transformers"},
    "runtime.device": "cpu",
    "stages.model": {"source": "tiny"},
}
TRAINING = {"max_steps": 1, "batch_size": 4, "micro_batch_size": 4, "max_rows": 8, "eval_rows": 2, "max_length": 1024}
ROLLOUT = {"updates": 1, "rollout_batch": 4, "samples_per_prompt": 2, "num_mini_batches": 1, "max_tokens": 24}


def run_small(name: str, folder: Path, **stages: dict[str, Any]) -> Any:
    """Run a shipped pipeline with a tiny model and the fields of ``stages``."""
    changes = dict(TINY)
    for stage, fields in stages.items():
        changes |= {f"stages.{stage}.{field}": value for field, value in fields.items()}
    return Pipeline.load(f"pipelines/{name}.yaml").changed(changes).run(store=folder / "store")


def metrics(run: Any, stage: str) -> dict[str, Any]:
    values: dict[str, Any] = run.artifacts[stage].record["metrics"]
    return values


@pytest.mark.usefixtures("stages_in_process")
def test_reason_trains_with_and_without_thoughts(tmp_path: Path) -> None:
    answers = {"max_tokens": 24, "max_prompts": 4, "bootstrap": 100}
    run = run_small(
        "reason",
        tmp_path,
        data={"max_rows": 40},
        sft=TRAINING,
        direct_sft=TRAINING,
        grpo=ROLLOUT | {"thinking_budget": 8},
        direct_grpo=ROLLOUT,
        evaluate=answers | {"thinking_budget": 8},
    )
    rows = read_rows(run.artifacts["data"].path / "train.parquet")
    assert {row["task"] for row in rows[:8]} == {"sum", "rank"}  # the rows that SFT reads have both
    assert all(row["completion"][0]["content"].endswith(f"</think>\n\n{row['answer']}") for row in rows)
    assert metrics(run, "sft")["thought_rows"] == 8 and "thought_rows" not in metrics(run, "direct_sft")
    assert metrics(run, "grpo")["episodes"] == metrics(run, "direct_grpo")["episodes"] == 4
    card = run.scorecard()
    assert {system.name for system in card.systems} == {"model", "sft", "grpo", "direct_sft", "direct_grpo"}
    options = argparse.Namespace(
        engine="transformers", threads=1, prompts=2, prompt_tokens=128, max_tokens=24, thinking_budget=8
    )
    questions, conditions = measure(run.artifacts["sft"].path / "model", run.artifacts["data"].path, options)
    assert len(questions) == 2 and not conditions  # an untrained model writes no thoughts


@pytest.mark.usefixtures("stages_in_process")
def test_verified_scores_math_and_code_by_verifiers(tmp_path: Path) -> None:
    answers = {"max_tokens": 8, "max_prompts": 2, "bootstrap": 100}
    rollouts = dict.fromkeys(("grpo_math", "ppo_math", "grpo_code", "ppo_code"), ROLLOUT)
    run = run_small(
        "verified",
        tmp_path,
        data={"max_rows": 40},
        math={"max_rows": 40},
        code={"max_rows": 40},
        sft=TRAINING | {"epochs": 1},
        evaluate_math=answers,
        evaluate_code=answers,
        **rollouts,
    )
    for stage in rollouts:
        kind = stage.partition("_")[2]
        points = run.log_history(stage)
        assert any(f"score_{kind}_no_answer" in point or f"score_{kind}_unparsable" in point for point in points)
    assert set(metrics(run, "ppo_code")["sandboxes"]) == {"code"} and "sandboxes" not in metrics(run, "ppo_math")
    assert {system.name for system in run.scorecard("evaluate_code").systems} == {
        "model",
        "sft",
        "grpo_code",
        "ppo_code",
    }


def test_thoughts_of_sums_lead_to_the_answer() -> None:
    for record in steps.sums(count=40, terms=4):
        question, reply = record["messages"]
        expression = question["content"].removeprefix("What is ").removesuffix("?")
        results = [line.partition("=") for line in reply["reasoning_content"].splitlines()]
        assert len(results) == 3 and all(eval(step) == int(result) for step, _, result in results)
        assert results[-1][2] == reply["content"] == record["answer"] == str(eval(expression))


def test_thoughts_of_ranks_have_the_numbers_in_order() -> None:
    for record in steps.ranks(count=40):
        question, reply = record["messages"]
        numbers = sorted(map(int, re.findall(r"\d+", question["content"])))
        assert [int(line) for line in reply["reasoning_content"].splitlines()] == numbers
        place = next(index for index, rank in enumerate(steps.RANKS) if f"the {rank} of" in question["content"])
        assert int(reply["content"]) == int(record["answer"]) == numbers[place]


def test_questions_are_distinct() -> None:
    for questions in (verified_rows.math_questions, verified_rows.code_questions):
        first = [row["messages"][0]["content"] for row in questions(count=30)]
        second = [row["messages"][0]["content"] for row in questions(count=30, skip=30)]
        assert len({*first, *second}) == 60
    for questions in (steps.sums, steps.ranks):
        assert len({row["messages"][0]["content"] for row in questions(count=200)}) == 200


@pytest.mark.parametrize("kind", ["math", "code"])
def test_verifiers_accept_the_answers_of_the_examples(kind: str) -> None:
    column = {"math": "answer", "code": "tests"}[kind]
    scorer = open_verifier(validate(EnvironmentVerifier, {kind: column, "seconds": 60.0}, "p.yaml"), "score[0]")
    questions = getattr(verified_rows, f"{kind}_questions")
    rows = [{"id": str(number)} | row for number, row in enumerate(itertools.islice(questions(), 6))]
    answers = [row["messages"][1]["content"] for row in rows]
    assert scorer.score(rows, answers).total == [1.0] * 6
    assert scorer.score(rows, [*answers[1:], answers[0]]).total == [0.0] * 6
    if kind == "code":
        assert all(len(json.loads(row["tests"])) == 3 for row in rows)
