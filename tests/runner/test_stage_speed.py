"""The type of a stage's products, measured and kept; and warnings about slow stages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align import Pipeline
from align.config.runtime import Runtime
from align.models.compute.costs import ProductSpeed, write_speed
from align.pipeline.context import StageContext
from align.runner import stage_speed
from align.runner.plan import Step
from align.runner.stage_speed import SlowStageWatch, Usage, choose_precision, plan_notes
from align.store.artifacts import Artifact, Kind

EMULATED, NATIVE = ProductSpeed(bfloat16=14.0, float32=134.0), ProductSpeed(bfloat16=430.0, float32=185.0)
CPU = Runtime(device="cpu")
AUTO = SimpleNamespace(precision="auto")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> list[ProductSpeed]:
    """The speed that is measured: the last one of the list."""
    speeds = [EMULATED]
    monkeypatch.setattr(stage_speed, "read_speed", lambda: speeds[-1])
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
    (tmp_path / stage_speed.PRECISION_FILE).write_text("{")
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
    monkeypatch.setattr(stage_speed, "read_speed", lambda: None)
    (note,) = plan_notes(pipeline(), steps(pipeline()))
    assert note == "precision auto: this processor is measured when the first stage starts"


EMULATED = ProductSpeed(bfloat16=14.0, float32=134.0)
CAUSE = "this processor emulates bfloat16 (float32 134 GFLOP/s, bfloat16 14); set `precision: auto`"


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counters of the machine, which tests change: seconds of this process, busy per cent, bytes swapped in."""
    counters: dict[str, Any] = {"time": 0.0, "cpu": 0.0, "busy": 50.0, "swapped": 0}

    def now() -> Usage:
        return Usage(counters["time"], counters["cpu"], counters["swapped"])

    monkeypatch.setattr(stage_speed.Usage, "now", staticmethod(now))
    monkeypatch.setattr(stage_speed.psutil, "cpu_percent", lambda: counters["busy"])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    return counters


def context(tmp_path: Path, precision: str = "bfloat16") -> StageContext:
    config = SimpleNamespace(precision=precision)
    places = (tmp_path, tmp_path / "checkpoints", tmp_path / "events.jsonl")
    return StageContext("sft", config, {}, 1, Runtime(device="cpu"), *places)


def event(seconds: float, done: float, tokens: int | None = None, total: float = 25) -> dict[str, Any]:
    return {"time": seconds, "done": done, "total": total, "unit": "steps", "tokens": tokens}


def warnings(stage: StageContext) -> list[str]:
    if not stage.events.exists():
        return []
    lines = [json.loads(line) for line in stage.events.read_text().splitlines()]
    return [line["message"] for line in lines if line["event"] == "warning"]


def test_first_step_that_takes_long_gives_a_bound(tmp_path: Path) -> None:
    stage = context(tmp_path)
    watch = SlowStageWatch(stage, EMULATED, cores=2)
    watch.look(50.0)  # nothing is known before the work begins
    stage.pace.update(event(10.0, 0, tokens=0))
    watch.look(20.0)
    assert warnings(stage) == []
    watch.look(50.0)  # 25 steps of at least 40 s each
    watch.look(55.0)
    assert warnings(stage) == [f"sft: step 1 has taken 40s so far, so more than 16m 40s are left; {CAUSE}."]


def test_measured_pace_is_told_once(tmp_path: Path) -> None:
    stage = context(tmp_path)
    watch = SlowStageWatch(stage, EMULATED, cores=2)
    stage.pace.update(event(10.0, 0, tokens=0))
    stage.pace.update(event(110.0, 1, tokens=550))
    watch.look(111.0)
    watch.look(116.0)
    assert warnings(stage) == [f"sft: 5.5 tokens/s, about 40m 00s left; {CAUSE}."]


@pytest.mark.parametrize(
    ("changes", "cores", "cause"),
    [
        ({}, 4, "it uses 2 of 4 cores (runtime.threads)"),
        ({"cpu": 20.0, "busy": 99.0}, 2, "other processes use the cores (this one got 10% of 2)"),
        ({"cpu": 190.0, "swapped": 2**30}, 2, "memory is swapped to disk"),
    ],
)
def test_each_cause_is_named(
    changes: dict[str, Any], cores: int, cause: str, tmp_path: Path, quiet_machine: dict[str, Any]
) -> None:
    stage = context(tmp_path, "float32")
    watch = SlowStageWatch(stage, EMULATED, cores)
    quiet_machine.update(time=100.0, **changes)
    stage.pace.update(event(10.0, 0, tokens=0))
    stage.pace.update(event(110.0, 1, tokens=550))
    watch.look(111.0)
    assert warnings(stage) == [f"sft: 5.5 tokens/s, about 40m 00s left; {cause}."]


def test_slow_stage_without_cause_is_not_reported(tmp_path: Path, quiet_machine: dict[str, Any]) -> None:
    stage = context(tmp_path, "float32")
    watch = SlowStageWatch(stage, EMULATED, cores=2)
    quiet_machine.update(time=100.0, cpu=199.0, busy=99.0)
    stage.pace.update(event(10.0, 0))
    stage.pace.update(event(110.0, 1))
    watch.look(111.0)
    assert warnings(stage) == []


def test_stage_that_ends_soon_is_not_reported(tmp_path: Path) -> None:
    stage = context(tmp_path)
    watch = SlowStageWatch(stage, EMULATED, cores=2)
    stage.pace.update(event(10.0, 0))
    stage.pace.update(event(60.0, 20))  # 12 s left
    watch.look(61.0)
    assert warnings(stage) == []


def test_work_without_tokens_shows_its_units(tmp_path: Path) -> None:
    stage = context(tmp_path)
    watch = SlowStageWatch(stage, EMULATED, cores=2)
    stage.pace.update(event(0.0, 0))
    stage.pace.update(event(60.0, 3))
    watch.look(61.0)
    assert warnings(stage) == [f"sft: 3 steps/min, about 7m 20s left; {CAUSE}."]


def test_thread_looks_until_the_stage_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_speed, "FIRST_LOOK", 0.01)
    monkeypatch.setattr(stage_speed, "LOOK_EVERY", 0.01)
    stage = context(tmp_path)
    stage.pace.update(event(0.0, 0, tokens=0))  # since 1970
    with stage_speed.watch(stage, EMULATED, cores=2):
        for _ in range(500):
            if warnings(stage):
                break
            stage_speed.time.sleep(0.01)
    (message,) = warnings(stage)
    assert message.startswith("sft: step 1 has taken")
