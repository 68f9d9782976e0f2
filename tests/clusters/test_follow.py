"""The cores that a cluster gives become the threads of a stage's processes."""

from __future__ import annotations

from typing import Any

from align import Pipeline
from align.clusters.follow import with_threads

STAGES: dict[str, Any] = {
    "model": {"source": "tiny"},
    "data": {"recipe": "data_recipes/embedded.yaml"},
    "sft": {"model": "model", "data": "data", "learning_rate": 1e-3},
}


def threads(runtime: dict[str, Any], cores: int | None) -> dict[str, int | None]:
    pipeline = Pipeline({"name": "x", "runtime": runtime, "stages": STAGES})
    threaded = with_threads(pipeline, cores)
    assert {node.name: node.key for node in threaded} == {node.name: node.key for node in pipeline}
    return {name: runtime.threads for name, runtime in threaded.runtimes.items()}


def test_cores_are_split_among_processes_of_a_stage() -> None:
    assert threads({}, 8) == {"model": 8, "data": 8, "sft": 8}
    assert threads({"launch": {"processes": 4}}, 8) == {"model": 8, "data": 8, "sft": 2}
    assert threads({"launch": {"processes": 4}}, 2)["sft"] == 1
    assert threads({"launch": {"processes": "auto"}}, 8)["sft"] is None
    assert threads({"stages": {"sft": {"threads": 3, "device": "cpu"}}}, 8) == {"model": 8, "data": 8, "sft": 3}
    assert threads({"threads": 5}, 8) == {"model": 5, "data": 5, "sft": 5}
    assert threads({}, None) == {"model": None, "data": None, "sft": None}
