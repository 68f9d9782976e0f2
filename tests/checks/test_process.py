"""The process of every stage looks at what it is given: a damaged policy stops a run before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from align import Pipeline
from tests.support.refusals import Refused


def test_a_damaged_policy_stops_the_next_stage(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    inputs = "tests.support.stages.fixed_inputs"
    pipeline = Pipeline({
        "name": "damaged",
        "stages": {
            "sft": {"stage": f"{inputs}:POLICY", "folder": str(tmp_path / "cut")},
            "prompts": {"stage": f"{inputs}:PROMPTS", "count": 4},
            "sample": {"policy": "sft", "prompts": "prompts"},
        },
    })  # fmt: skip
    refused(pipeline.run, store=tmp_path / "store")
    (log,) = (tmp_path / "store" / "sample").glob("*.partial/result.json")
    assert json.loads(log.read_text(encoding="utf-8"))["status"] == "refused"
