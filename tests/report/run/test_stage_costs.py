"""Costs and numbers of the stages on a page."""

from __future__ import annotations

from pathlib import Path

from align.data.steps.pairs import make_pairs
from align.report.curves.metric_series import Events
from align.report.run.stage_costs import SAMPLE_METRICS, stage_rows
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
