"""Numbers of a run as rows and as tables of pandas, its curves and its scorecard."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from align import Pipeline, Run, open_rollouts, rollout_rows
from align.runner.runner import COLUMNS
from tests.support.finished_runs import PROMPTS, STEPS, publish_run
from tests.support.refusals import Refused
from tests.support.stored_rollouts import write_lines

pandas = pytest.importorskip("pandas")

STAGES = {
    "model": {"source": "tiny"},
    "data": {"recipe": "data_recipes/embedded.yaml"},
    "sft": {"model": "model", "data": "data", "learning_rate": 1e-3, "max_steps": STEPS},
    "evaluate": {"policies": ["model", "sft"], "reference": "sft", "prompts": "data", "score": "gold"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = tmp_path_factory.mktemp("store")
    pipeline = Pipeline.from_dict({"name": "mine", "stages": STAGES})
    publish_run(pipeline, store)
    run = pipeline.run(store=store)
    assert run.ran == []
    return run


def test_a_stage_has_a_row_for_each_number_of_its_record(run: Run) -> None:
    rows = [row for row in run.rows() if row["stage"] == "sft"]
    assert {row["metric"]: row["value"] for row in rows} == {
        "steps": STEPS, "dropped.too long": 3, "seconds": 4.0, "peak_memory_bytes": 2**30,
    }  # fmt: skip
    assert all(row["system"] is row["low"] is row["high"] is row["n"] is None for row in rows)


def test_an_evaluation_has_a_row_for_each_system_and_metric(run: Run) -> None:
    rows = [row for row in run.rows() if row["system"] is not None]
    assert [(row["stage"], row["system"], row["metric"]) for row in rows] == [
        ("evaluate", "model", "gold"),
        ("evaluate", "model", "reward"),
        ("evaluate", "model", "length"),
        ("evaluate", "sft", "gold"),
        ("evaluate", "sft", "reward"),
        ("evaluate", "sft", "length"),
    ]
    estimate = run.scorecard("evaluate").estimate("sft", "reward")
    last = rows[-2]
    assert (last["value"], last["low"], last["high"], last["n"]) == (
        estimate.value, estimate.low, estimate.high, PROMPTS,
    )  # fmt: skip
    assert not any(row["metric"].startswith("values") for row in run.rows())


def test_the_table_has_the_rows(run: Run) -> None:
    frame = run.frame()
    assert tuple(frame.columns) == COLUMNS
    assert str(frame.n.dtype) == "Int64"
    assert list(frame.stage.unique()) == list(STAGES)
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    assert records == run.rows()
    scores = frame[frame.stage == "evaluate"].pivot(index="system", columns="metric", values="value")
    assert scores.loc["sft", "reward"] == pytest.approx(0.1 + 0.01 * sum(item % 5 for item in range(PROMPTS)) / PROMPTS)


def test_curves_have_what_was_logged_and_the_later_value_counts(run: Run) -> None:
    history = run.log_history("sft")
    assert history[0] == {"step": 1, "loss": 1.0}
    assert history[-1] == {"step": STEPS, "loss": 1 / STEPS, "test_loss": 0.5, "score": 0.7, "kl": 0.1}
    curves = run.curves("sft")
    assert list(curves.columns) == ["loss", "test_loss", "score", "kl"]
    assert list(curves.index) == list(range(1, STEPS + 1)) and curves.index.name == "step"
    assert list(curves.loss) == [1 / step for step in range(1, STEPS + 1)]
    assert curves.test_loss.notna().sum() == 1


def test_a_run_without_numbers_has_empty_tables(tmp_path: Path) -> None:
    raw = {"name": "toy", "stages": {"env": {"stage": "tests.support.toy:ENV"}}}
    run = Pipeline(raw).run(store=tmp_path)
    assert run.curves("env").empty and run.curves("env").index.name == "step"
    empty = Run(run.store)
    assert empty.rows() == [] and tuple(empty.frame().columns) == COLUMNS


def test_a_stage_of_a_loop_is_its_last_round(run: Run) -> None:
    looped = Run(run.store, run.artifacts, last={"train": "sft"})
    assert looped.log_history("train") == run.log_history("sft")
    assert looped.metrics("train") == run.metrics("sft")


def test_rollouts_are_a_dataset_of_the_stage(refused: Refused, run: Run, tmp_path: Path) -> None:
    stage = Run(run.store, {"ppo": replace(run.artifact("sft"), stage="ppo", path=tmp_path)})
    write_lines(tmp_path / "rollouts", [{"update": 1, "prompt": "p", "response": "r", "score": 0.5}])
    write_lines(tmp_path / "validations", [{"update": 0, "prompt": "p", "response": "held out"}])
    assert stage.rollouts("ppo").to_table(columns=["score"]).to_pydict() == {"score": [0.5]}
    assert stage.rollouts().count_rows() == 1  # of the last stage with rollouts
    refused(run.rollouts)
    (row,) = rollout_rows(stage.rollouts("ppo", validations=True))
    assert (row["response"], row["prompt"], row["score"]) == ("held out", "p", None)
    assert [row["response"] for row in rollout_rows(open_rollouts(tmp_path / "rollouts"))] == ["r"]
    refused(run.rollouts, "sft")


def test_a_stage_that_is_not_there_is_refused(refused: Refused, run: Run) -> None:
    for call in (run.metrics, run.curves, run.log_history, run.scorecard, run.rollouts):
        refused(call, "stf")


def test_the_last_evaluation_is_the_scorecard(refused: Refused, run: Run, tmp_path: Path) -> None:
    assert run.scorecard() == run.scorecard("evaluate")
    first = run.artifact("evaluate")
    content = json.loads((first.path / "scorecard.json").read_text())
    (tmp_path / "scorecard.json").write_text(json.dumps({**content, "primary": "length"}))
    twice = Run(run.store, {**run.artifacts, "again": replace(first, stage="again", path=tmp_path)})
    assert twice.scorecard().primary == "length"
    assert twice.scorecard("evaluate").primary == "gold"
    refused(run.scorecard, "sft")
    refused(lambda: Run(run.store).scorecard())


def test_damaged_scorecard_names_the_stage_to_rebuild(refused: Refused, tmp_path: Path) -> None:
    raw = {"name": "toy", "stages": {"card": {"stage": "tests.support.toy:CARD"}}}
    run = Pipeline(raw).run(store=tmp_path)
    refused(run.frame)


def test_without_pandas_the_error_names_the_call_that_needs_none(
    refused: Refused, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    refused(run.frame)
    refused(run.curves, "sft")
    assert run.rows() and run.log_history("sft")
