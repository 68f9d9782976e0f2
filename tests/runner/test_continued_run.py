"""Continued stages as a run makes them: through the store, in a chain, with checks between stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import UserError
from align.report.page.curve_panels import curve_numbers
from align.report.page.metric_series import read_events
from align.report.run.run_report import write_report
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.store.store import Store
from tests.support.runs import Recorder

pytestmark = pytest.mark.usefixtures("stages_in_process")

SFT: dict[str, Any] = {
    "stage": "sft", "model": "model", "data": "data", "learning_rate": 3e-3, "batch_size": 8, "max_length": 512,
    "scheduler": "constant", "tuning": {"method": "lora", "rank": 4, "dropout": 0.1}, "eval_rows": 2,
}  # fmt: skip


def pipeline(**stages: dict[str, Any]) -> Pipeline:
    first = {"model": {"source": "tiny"}, "data": {"recipe": "data_recipes/embedded.yaml", "max_rows": 60}}
    runtime = {"device": "cpu", "threads": 1, "engine": {"name": "transformers"}}
    return Pipeline({"name": "run", "seed": 3, "runtime": runtime, "stages": {**first, **stages}})


def test_a_chain_of_stages_makes_the_weights_of_one(tmp_path: Path) -> None:
    chain = pipeline(
        once={**SFT, "max_steps": 9, "epochs": 2},
        first={**SFT, "max_steps": 2, "epochs": 2},
        second={"continue_from": "first", "max_steps": 5},
        third={"continue_from": "second", "max_steps": 9},
    )
    run = run_pipeline(chain, store=tmp_path / "store")
    assert run.artifacts["third"].weights == run.artifacts["once"].weights
    assert run.artifacts["third"].weights != run.artifacts["second"].weights
    record = run.artifacts["third"].record
    assert (record["metrics"]["continued_from_step"], record["metrics"]["steps"]) == (5, 9)
    tensors = [name for name in record["outputs"] if name.startswith("state/") and name.endswith(".safetensors")]
    size = sum(record["outputs"][name]["bytes"] for name in tensors)
    assert size == record["metrics"]["state_bytes"] > 0
    # The state is an output like any other: a flipped bit is refused before it is read.
    file = run.artifacts["second"].path / "state" / "trainer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"trainer.safetensors.*`--rebuild second`"):
        run_pipeline(chain, store=tmp_path / "store", rebuild=("third",))


def test_changed_settings_are_in_record_plan_report_and_curves(tmp_path: Path) -> None:
    more = {"continue_from": {"stage": "first", "at": "last", "change": {"learning_rate": 1e-3, "max_steps": 4}}}
    stages = pipeline(first={**SFT, "max_steps": 2}, more=more)
    (step,) = [step for step in plan(stages, Store.open(tmp_path / "store")) if step.node.name == "more"]
    assert "continues 'first', from there on with other settings: learning_rate: 0.003 → 0.001" in step.notes[0]
    run = run_pipeline(stages, store=tmp_path / "store")
    record = run.artifacts["more"].record
    assert record["metrics"]["changed"] == {"learning_rate": "0.003 → 0.001", "max_steps": "2 → 4"}
    assert record["config"]["continue_from"] == more["continue_from"]
    rates = {row["step"]: row["learning_rate"] for row in run.log_history("more") if "learning_rate" in row}
    assert rates == {3: 1e-3, 4: 1e-3}
    page = write_report(list(run.artifacts.values()), None, tmp_path / "report.html").read_text()
    assert "After step 2 (dotted line): learning_rate 0.003 → 0.001, max_steps 2 → 4." in page
    assert "changed.learning_rate" in page
    numbers = curve_numbers(read_events(run.artifacts["more"].path))
    assert numbers["changes"] == [{"x": 2.0, "text": "learning_rate 0.003 → 0.001, max_steps 2 → 4"}]
    assert plan(stages, Store.open(tmp_path / "store"))[-1].action == "cached"


def test_a_run_that_trains_finished_steps_again_says_so(tmp_path: Path) -> None:
    run_pipeline(pipeline(sft={**SFT, "max_steps": 1}), store=tmp_path / "store")
    recorder = Recorder()
    run_pipeline(pipeline(sft={**SFT, "max_steps": 2}), store=tmp_path / "store", listener=recorder)
    (warning,) = [text for kind, text in recorder.said if kind == "warning"]
    assert "its first 1 steps are finished" in warning
    assert "add `sft_more: {continue_from: sft, max_steps: 2}` below it" in warning


def test_stage_is_rebuilt_with_state_for_its_continuation(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_pipeline(pipeline(sft={**SFT, "max_steps": 1}).set("runtime.keep_state=false"), store=store)
    more = pipeline(sft={**SFT, "max_steps": 1}, more={"continue_from": "sft", "max_steps": 2})
    with pytest.raises(UserError, match="finished without the trainer's state. `--rebuild sft` runs it again"):
        run_pipeline(more.set("runtime.keep_state=false"), store=store)
    run = run_pipeline(more.set("runtime.keep_state=false"), store=store, rebuild=("sft",))
    assert run.ran == ["sft", "more"]
    assert [step.action for step in plan(more, Store.open(store))] == ["cached"] * 4
