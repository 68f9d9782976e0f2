"""Tasks between the updates of RL: they use the stage's engine, change no result, and choose the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.errors import UserError
from align.pipeline.context import StageContext
from align.stages.rl import run
from tests.support.rl.stages import make_stage
from tests.support.training.harness import events
from tests.support.training.killed_stage import Killed, dying


def stage(root: Path, model: Path, evaluation: dict[str, Any] | None, **fields: Any) -> StageContext:
    """A GRPO stage with a task that samples and a task that reads."""
    root.mkdir(parents=True, exist_ok=True)
    sums = [{"question": f"{n} + 1", "answer": f"#### {n + 1}"} for n in range(3)]
    choices = [{"question": f"vowel {n}", "choices": ["oa", "xz"], "answer": 0} for n in range(4)]
    tasks = {"sums": {"task": "gsm8k", "max_tokens": 4}, "vowels": {"task": "multiple_choice", "format": "generic"}}
    for (name, task), records in zip(tasks.items(), (sums, choices), strict=True):
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        task |= {"files": [str(file)]}
    if evaluation is not None:
        fields["evaluate"] = {"every": 2, "at_most": 1.0, "tasks": tasks, **evaluation}
    return make_stage("grpo", root, model, **fields)


def weights(context: StageContext) -> dict[str, Any]:
    return load_file(context.output / "model" / "model.safetensors")


def points(context: StageContext) -> dict[int, float]:
    return {event["step"]: event["vowels.acc"] for event in events(context, "metrics") if "vowels.acc" in event}


def test_tasks_do_not_change_updates(tiny_model: Path, tmp_path: Path) -> None:
    plain = stage(tmp_path / "plain", tiny_model, None)
    evaluated = stage(tmp_path / "evaluated", tiny_model, {})
    run(plain)
    metrics = run(evaluated)
    assert all(tensor.equal(weights(plain)[name]) for name, tensor in weights(evaluated).items())
    assert set(points(evaluated)) == {0, 2, 4, 5}
    assert metrics["vowels.acc_last"] == points(evaluated)[5]
    assert metrics["evaluations"] == 4 and 0 < metrics["evaluation_share"] < 1


def test_best_metric_chooses_policy_also_after_resuming(tiny_model: Path, tmp_path: Path) -> None:
    choice: dict[str, Any] = {"every": 1, "best_metric": "sums.no_such"}
    with pytest.raises(UserError, match=r"best_metric 'sums.no_such' does not exist"):
        run(stage(tmp_path / "wrong", tiny_model, choice, keep="best"))
    choice["best_metric"] = "vowels.acc"
    whole = stage(tmp_path / "whole", tiny_model, choice, keep="best")
    metrics = run(whole)
    accuracies = points(whole)
    best = max(accuracies, key=lambda update: (accuracies[update], -update))
    assert metrics["kept"]["update"] == best and metrics["kept"]["vowels.acc"] == accuracies[best]
    killed = stage(tmp_path / "killed", tiny_model, choice, keep="best")
    with pytest.raises(Killed):
        run(dying(killed, 3, "updates"))
    resumed = run(killed)
    assert (points(killed), resumed["kept"]) == (accuracies, metrics["kept"])
    assert all(tensor.equal(weights(whole)[name]) for name, tensor in weights(killed).items())
