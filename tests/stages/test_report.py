"""The report stage: its configuration, and a page from the stage's own inputs."""

import json
from pathlib import Path

from align.config.runtime import Runtime
from align.config.stages.evaluate import ReportConfig
from align.pipeline.context import StageContext
from align.report.run.run_report import run
from align.store.artifacts import Artifact, Kind


def context(tmp_path: Path, config: ReportConfig, inputs: dict) -> StageContext:
    (tmp_path / "out").mkdir()
    (tmp_path / "checkpoints").mkdir()
    return StageContext(
        "report", config, inputs, 0, Runtime(), tmp_path / "out", tmp_path / "checkpoints", tmp_path / "events.jsonl"
    )


def test_a_report_about_nothing_is_refused(refused):
    refused(ReportConfig)


def test_cost_and_curves_need_no_scorecard(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    points = [{"event": "metrics", "step": step, "loss": 2.0 / step} for step in (1, 2)]
    (folder / "events.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    artifact = Artifact("sft", Kind.POLICY, folder, {"kind": "sft", "seconds": 3.0, "tokens": 40})
    metrics = run(context(tmp_path, ReportConfig(stages=["sft"]), {"scorecard": None, "stages": [artifact]}))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "loss over steps" in text
    assert metrics["stages"] == 1


def test_another_format_of_scorecard_is_refused(refused, tmp_path):
    folder = tmp_path / "evaluate"
    folder.mkdir()
    (folder / "scorecard.json").write_text(json.dumps({"format": 99}))
    artifact = Artifact("evaluate", Kind.SCORECARD, folder, {})
    refused(lambda: run(context(tmp_path, ReportConfig(scorecard="evaluate"), {"scorecard": artifact, "stages": []})))
