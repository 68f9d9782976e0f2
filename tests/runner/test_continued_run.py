"""Continued stages as a run makes them: through the store, in a chain, with checks between stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import UserError
from align.pipeline.stop_signal import Stopped
from align.report.page.curve_panels import curve_numbers
from align.report.page.metric_series import read_events
from align.report.run.run_report import write_report
from align.runner.open_store import settle_states
from align.runner.plan import History, plan
from align.runner.runner import run_pipeline
from align.store.garbage import delete_garbage
from align.store.json_files import read_events as read_stored_events
from align.store.store import Store
from tests.support.refusals import Refused
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


GRPO: dict[str, Any] = {
    "stage": "grpo", "policy": "model", "prompts": "data", "score": "tests.support.stages.vowels:share",
    "learning_rate": 1e-3, "rollout_batch": 8, "samples_per_prompt": 4, "max_tokens": 4, "precision": "float32",
    "tuning": {"method": "lora", "rank": 4}, "score_validation": {"floor": 0},
}  # fmt: skip
STOPPED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sft": (
        {**SFT, "scheduler": "cosine", "max_steps": 6, "epochs": 2, "save_steps": 2},
        {"learning_rate": 1e-3},
        "loss",
    ),
    "grpo": ({**GRPO, "scheduler": "linear", "updates": 5, "num_epochs": 2}, {"kl_coef": 0.5}, "score"),
}


@pytest.mark.parametrize("kind", STOPPED)
def test_stopped_stage_continues_with_other_settings(
    refused: Refused, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to a stage that ends there and keeps its state; the stopped stage itself can still resume."""
    fields, change, metric = STOPPED[kind]
    store = Store.open(tmp_path / "store")
    first = pipeline(first=fields)
    stop_after(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_pipeline(first, store=store)
    monkeypatch.undo()
    whole = first.nodes["first"]
    checkpoints = store.partial(kind, whole.key) / "checkpoints"
    before = {file: file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()}

    other = History(pipeline(first={**fields, **change}), store)
    suggestion = other.suggest(other.pipeline.nodes["first"])
    assert suggestion is not None and "'first' was stopped after" in suggestion and "at: last, change: {" in suggestion

    last = {"continue_from": {"stage": "first", "at": "last", "change": change}}
    more = settle_states(pipeline(first=fields, more=last), store)
    assert more.nodes["more"].config.continue_from.at == 3
    notes = {step.node.name: " ".join(step.notes) for step in plan(more, store)}
    assert (
        f"ends after {'step' if kind == 'sft' else 'update'} 3, where 'more' continues it; its checkpoint is"
        in notes["first"]
    )
    run = run_pipeline(pipeline(first=fields, more=last), store=store)
    assert run.artifacts["first"].key == more.nodes["first"].key != whole.key
    assert run.artifacts["more"].record["config"]["continue_from"]["at"] == 3
    assert [row["step"] for row in run.log_history("first") if metric in row] == [1, 2, 3]
    assert min(row["step"] for row in run.log_history("more") if metric in row) == 4
    # 1. A store without the checkpoint makes the same weights from the number alone.
    again = run_pipeline(more, store=tmp_path / "other")
    for name in ("first", "more"):
        assert again.artifacts[name].weights == run.artifacts[name].weights, name
    # 2. Without a change it is the uninterrupted run; the stopped stage resumes to the same.
    assert {file: file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()} == before
    plain = {"continue_from": {"stage": "first", "at": 3}}
    unchanged = run_pipeline(pipeline(first=fields, more=plain), store=store)
    uninterrupted = run_pipeline(first, store=store)
    assert uninterrupted.ran == ["first"]
    assert unchanged.artifacts["more"].weights == uninterrupted.artifacts["first"].weights
    # 3. The finished stage has nothing left; the number still names the state from before.
    refused(lambda: run_pipeline(pipeline(first=fields, more=last), store=store))
    assert run_pipeline(more, store=store).ran == []


def test_end_of_a_stage_is_found_after_its_checkpoints_are_gone(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = STOPPED["sft"][0]
    store = Store.open(tmp_path / "store")
    last = pipeline(first=fields, more={"continue_from": {"stage": "first", "change": {"learning_rate": 1e-3}}})
    refused(run_pipeline, last, store=store)
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        run_pipeline(pipeline(first=fields), store=store)
    monkeypatch.undo()
    run_pipeline(last, store=store)
    assert store.partial("sft", pipeline(first=fields).nodes["first"].key) in delete_garbage(store)
    assert run_pipeline(last, store=store).ran == []


def stop_after(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """Have stages ask themselves to stop after so many steps, or updates."""

    def is_requested(folder: Path) -> bool:
        points = [event["step"] for event in read_stored_events(folder / "events.jsonl") if event["event"] == "metrics"]
        return max(points, default=0) >= point - 1  # a point is logged after the request was looked for

    monkeypatch.setattr("align.training.stopping.is_stop_requested", is_requested)


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
