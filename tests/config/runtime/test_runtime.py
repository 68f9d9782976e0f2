"""``runtime.stages``: what differs for one stage, in what it is given, what is refused, and what stays out of keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.runtime import Runtime
from align.pipeline.process_limits import SLEEPING, SPINNING
from align.runner.runner import run_pipeline
from tests.support import toy
from tests.support.loops import looped


def with_runtime(runtime: dict[str, Any], raw: dict[str, Any] | None = None) -> Pipeline:
    return Pipeline({**(raw or toy.pipeline()), "runtime": runtime}, "p.yaml")


def test_stage_runtime_overrides_run_runtime() -> None:
    engine = {"name": "vllm", "batch_size": 32}
    pipeline = with_runtime({"threads": 3, "engine": engine, "stages": {"one": {"engine": {"batch_size": 64}}}})
    first, second = pipeline.runtimes["one"], pipeline.runtimes["two"]
    assert (first.engine.name, first.engine.batch_size, first.threads) == ("vllm", 64, 3)
    assert second.engine.batch_size == 32 and first.stages == second.stages == {}


def test_a_null_says_nothing() -> None:
    pipeline = with_runtime({"threads": 3, "stages": {"one": {"threads": None, "engine": None}}})
    assert pipeline.runtimes["one"].threads == 3


def test_a_stages_process_gets_its_own_part_and_its_key_stays(tmp_path: Path) -> None:
    raw = {"name": "envs", "stages": {name: {"stage": "tests.support.toy:ENV"} for name in ("narrow", "wide")}}
    raw["stages"]["wide"]["number"] = 2  # another key
    pipeline = with_runtime({"threads": 1, "stages": {"wide": {"threads": 5}}}, raw)
    run = run_pipeline(pipeline, store=tmp_path)
    environments = {
        name: json.loads((run.artifacts[name].path / "environment.json").read_text()) for name in raw["stages"]
    }
    assert {name: each["OMP_NUM_THREADS"] for name, each in environments.items()} == {"narrow": "1", "wide": "5"}
    assert {node.key for node in Pipeline(raw)} == {node.key for node in pipeline}


def test_threads_spin_if_no_other_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_policy(folder: str) -> dict[str, str]:
        pipeline = Pipeline({"name": "envs", "stages": {"one": {"stage": "tests.support.toy:ENV"}}})
        run = run_pipeline(pipeline, store=tmp_path / folder)
        environment = json.loads((run.artifacts["one"].path / "environment.json").read_text())
        return {name: environment[name] for name in SPINNING if name in environment}

    for name in SPINNING:
        monkeypatch.delenv(name, raising=False)
    assert wait_policy("none") in (SPINNING, SLEEPING)  # another run may be on this machine
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert wait_policy("own") == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_a_name_in_a_loop_means_every_round_unless_one_is_named() -> None:
    pipeline = with_runtime({"stages": {"drawn": {"threads": 4}, "drawn-2": {"threads": 7}}}, looped())
    threads = {name: runtime.threads for name, runtime in pipeline.runtimes.items()}
    assert threads == {
        "start": None, "drawn-1": 4, "total-1": None, "drawn-2": 7, "total-2": None, "drawn-3": 4, "total-3": None
    }  # fmt: skip


def test_a_deterministic_run_samples_with_transformers() -> None:
    assert Runtime().engine.name == "auto"
    deterministic = Runtime.model_validate({"deterministic": True, "engine": {"batch_size": 4}})
    assert (deterministic.engine.name, deterministic.engine.batch_size) == ("transformers", 4)
    assert Runtime(deterministic=True).for_stage("any").engine.name == "transformers"
