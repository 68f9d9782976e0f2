"""Stages on the page: the diagram of the pipeline, and what each stage cost."""

from __future__ import annotations

from pathlib import Path

from align.data.steps.pairs import make_pairs
from align.report.page.metric_series import Events
from align.report.run.stage_costs import SAMPLE_METRICS, pipeline_diagram, stage_rows
from align.store.artifacts import Artifact, Kind

METHODS = Path(__file__).parents[3] / "docs" / "methods.md"


def meanings(kind: str, metrics: dict[str, float]) -> dict[str, str]:
    artifact = Artifact("one", Kind.PREFERENCES, Path(), {"kind": kind, "metrics": metrics})
    (row,) = stage_rows([artifact], {"one": Events()})
    return {name: meaning for name, _, meaning in row["metrics"]}


def test_metrics_of_sample_are_described_in_words() -> None:
    _, counts = make_pairs([], [], [], "all", noise=0.0, seed=0)
    assert counts.keys() < SAMPLE_METRICS.keys()
    metrics = {f"train_{name}": 1.0 for name in SAMPLE_METRICS}
    assert all(meanings("sample", metrics).values())
    assert meanings("sample", {"test_tied": 3})["test_tied"] == (
        "comparisons of equal scores, which make no pair, test split"
    )
    assert meanings("sample", {"train_mean_score_brief": 1.0})["train_mean_score_brief"] == (
        "mean of the score brief, train split"
    )
    assert meanings("sft", {"train_pairs": 1.0}) == {"train_pairs": ""}


def test_docs_describe_the_metrics_of_sample_alike() -> None:
    text = METHODS.read_text(encoding="utf-8")
    for name, meaning in SAMPLE_METRICS.items():
        assert f"| `{name}` | {meaning} |" in text


def test_columns_follow_the_longest_path(run):
    diagram = pipeline_diagram(run[0], None)
    x = {box["name"]: box["x"] for box in diagram["boxes"]}
    assert x["model"] == x["data"] < x["sft"] < x["ppo"] < x["evaluate"]
    assert len(diagram["arrows"]) == 2 + 2 + 4
    assert max(x.values()) + diagram["box_width"] <= diagram["width"]


def test_boxes_never_overlap(run):
    boxes = pipeline_diagram(run[0], None)["boxes"]
    assert len({(box["x"], box["y"]) for box in boxes}) == len(boxes)


def test_a_failed_stage_and_what_waits_for_it(run):
    failed = {"stage": "dpo", "message": "no", "inputs": ["sft"], "pending": ["report"]}
    boxes = {box["name"]: box for box in pipeline_diagram(run[0][:3], failed)["boxes"]}
    assert boxes["dpo"]["status"] == "failed"
    assert boxes["report"]["status"] == "pending"
    assert boxes["sft"]["x"] < boxes["dpo"]["x"] < boxes["report"]["x"]


def test_marks_show_the_state_of_each_stage(run):
    running = {"stage": "dpo", "message": "", "inputs": ["sft"], "status": "running"}
    diagram = pipeline_diagram(run[0][:3], running, cached=("model",), pending={"evaluate": ["sft", "dpo"]})
    marks = {box["name"]: box["mark"] for box in diagram["boxes"]}
    assert marks == {"model": "↺", "data": "✓", "sft": "✓", "dpo": "▶", "evaluate": "…"}
    boxes = {box["name"]: box for box in diagram["boxes"]}
    assert boxes["sft"]["x"] < boxes["dpo"]["x"] < boxes["evaluate"]["x"]
    assert len(diagram["arrows"]) == 2 + 1 + 2
    assert diagram["legend"] == ["✓ finished", "↺ cached", "▶ running", "… not run"]


def test_a_stage_that_paid_says_so(make_artifact):
    plain, paid = make_artifact("a", Kind.MODEL), make_artifact("b", Kind.PREFERENCES, metrics={"cost": 0.5})
    assert pipeline_diagram([plain], None)["box_height"] < pipeline_diagram([plain, paid], None)["box_height"]
    assert pipeline_diagram([plain, paid], None)["boxes"][1]["lines"][-1] == "endpoints: 0.500"


def test_an_empty_run_has_a_picture():
    assert pipeline_diagram([], None)["boxes"] == []


def test_a_long_name_is_shortened(make_artifact):
    box = pipeline_diagram([make_artifact("a" * 40, Kind.MODEL)], None)["boxes"][0]
    assert len(box["short"]) < 20
