"""A stage that is slow for a reason says so within a minute: first a bound, then the measured pace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.runtime import Runtime
from align.models.compute_types import ProductSpeed
from align.pipeline.context import StageContext
from align.runner import slow_stage
from align.runner.slow_stage import SlowStageWatch, Usage

EMULATED = ProductSpeed(bfloat16=14.0, float32=134.0)
CAUSE = "this processor emulates bfloat16 (float32 134 GFLOP/s, bfloat16 14); set `precision: auto`"


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counters of the machine, which tests change: seconds of this process, busy per cent, bytes swapped in."""
    counters: dict[str, Any] = {"time": 0.0, "cpu": 0.0, "busy": 50.0, "swapped": 0}

    def now() -> Usage:
        return Usage(counters["time"], counters["cpu"], counters["swapped"])

    monkeypatch.setattr(slow_stage.Usage, "now", staticmethod(now))
    monkeypatch.setattr(slow_stage.psutil, "cpu_percent", lambda: counters["busy"])
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
    monkeypatch.setattr(slow_stage, "FIRST_LOOK", 0.01)
    monkeypatch.setattr(slow_stage, "LOOK_EVERY", 0.01)
    stage = context(tmp_path)
    stage.pace.update(event(0.0, 0, tokens=0))  # since 1970
    with slow_stage.watch(stage, EMULATED, cores=2):
        for _ in range(500):
            if warnings(stage):
                break
            slow_stage.time.sleep(0.01)
    (message,) = warnings(stage)
    assert message.startswith("sft: step 1 has taken")
