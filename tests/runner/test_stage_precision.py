"""The type a stage computes in: chosen once, kept by later attempts and by stages that continue it, and shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align import Pipeline
from align.config.runtime import Runtime
from align.models.compute_types import ProductSpeed, write_speed
from align.runner import stage_precision
from align.runner.plan import Step
from align.runner.stage_precision import choose_precision, plan_notes
from align.store.artifacts import Artifact, Kind

EMULATED, NATIVE = ProductSpeed(bfloat16=14.0, float32=134.0), ProductSpeed(bfloat16=430.0, float32=185.0)
CPU = Runtime(device="cpu")
AUTO = SimpleNamespace(precision="auto")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> list[ProductSpeed]:
    """The speed that is measured: the last one of the list."""
    speeds = [EMULATED]
    monkeypatch.setattr(stage_precision, "read_speed", lambda: speeds[-1])
    return speeds


def pipeline(**values: Any) -> Pipeline:
    training = {"model": "model", "data": "data", "learning_rate": 1e-3}
    raw = {
        "name": "types",
        "runtime": {"device": "cpu"},
        "stages": {
            "model": {"source": "tiny"},
            "data": {"recipe": "data_recipes/embedded.yaml"},
            "sft": dict(training),
            "other": {"stage": "sft", **training, "precision": "bfloat16"},
        },
    }
    return Pipeline({**raw, **values})


def test_auto_is_the_faster_type(tmp_path: Path, speed: list[ProductSpeed]) -> None:
    assert choose_precision(tmp_path, AUTO, {}, CPU) == "float32"
    speed.append(NATIVE)
    assert choose_precision(tmp_path / "..", AUTO, {}, CPU) == "bfloat16"


def test_resumed_attempt_keeps_the_first_type(tmp_path: Path, speed: list[ProductSpeed]) -> None:
    assert choose_precision(tmp_path, AUTO, {}, CPU) == "float32"
    speed.append(NATIVE)
    assert choose_precision(tmp_path, AUTO, {}, CPU) == "float32"
    (tmp_path / stage_precision.PRECISION_FILE).write_text("{")
    assert choose_precision(tmp_path, AUTO, {}, CPU) == "bfloat16"


def test_continued_stage_keeps_its_sources_type(tmp_path: Path, speed: list[ProductSpeed]) -> None:
    source = Artifact("sft", Kind.POLICY, tmp_path, {"precision": "bfloat16"})
    assert choose_precision(tmp_path, AUTO, {"continue_from": source}, CPU) == "bfloat16"


def test_precision_of_pipeline_applies_to_all_stages() -> None:
    plain, overridden = pipeline(), pipeline(precision="float32")
    assert plain.nodes["sft"].config.precision == "auto"  # type: ignore[attr-defined]
    assert overridden.nodes["sft"].config.precision == "float32"  # type: ignore[attr-defined]
    # A stage's own setting wins, and stages without products have no such field.
    assert overridden.nodes["other"].config.precision == "bfloat16"  # type: ignore[attr-defined]
    assert overridden.nodes["data"].key == plain.nodes["data"].key
    assert overridden.nodes["sft"].key != plain.nodes["sft"].key
    assert plain.set("precision=float32").nodes["sft"].key == overridden.nodes["sft"].key


def test_key_is_the_same_on_every_processor(speed: list[ProductSpeed]) -> None:
    first = pipeline().nodes["sft"].key
    speed.append(NATIVE)
    assert pipeline().nodes["sft"].key == first


def steps(chosen: Pipeline, action: str = "run") -> list[Step]:
    return [Step(node, action, "never run") for node in chosen]


def test_plan_names_the_type_and_an_emulated_one(speed: list[ProductSpeed]) -> None:
    chosen = pipeline()
    auto, warning = plan_notes(chosen, steps(chosen))
    assert auto == "precision auto: float32 on this processor (float32 134 GFLOP/s, bfloat16 14)"
    assert warning.startswith("! other: this processor emulates bfloat16") and "10 times as long" in warning
    assert plan_notes(chosen, steps(chosen, "cached")) == []
    speed.append(NATIVE)
    (auto,) = plan_notes(chosen, steps(chosen))
    assert auto.startswith("precision auto: bfloat16")


@pytest.mark.parametrize(("precision", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_stage_records_its_type_and_warns_of_emulation(
    precision: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    write_speed(EMULATED)
    stages = {"products": {"stage": "tests.support.toy:PRODUCTS", "precision": precision}}
    raw = {"name": "types", "runtime": {"device": "cpu"}, "stages": stages}
    artifact = Pipeline(raw).run(store=tmp_path / "store").artifacts["products"]
    assert (artifact.path / "type.txt").read_text() == artifact.record["precision"] == expected
    assert artifact.record["config"]["precision"] == precision
    events_file = artifact.path / "events.jsonl"
    events = events_file.read_text() if events_file.exists() else ""
    assert ("this processor emulates bfloat16" in events) == (precision == "bfloat16")


def test_plan_without_measurement_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_precision, "read_speed", lambda: None)
    (note,) = plan_notes(pipeline(), steps(pipeline()))
    assert note == "precision auto: this processor is measured when the first stage starts"
