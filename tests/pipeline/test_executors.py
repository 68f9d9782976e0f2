"""``--on``, files that extend others with another executor, and stages that name another one than the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.runtime.executor import LocalExecutor, RayExecutor, SlurmExecutor
from tests.support import toy
from tests.support.refusals import Refused

SLURM = {"name": "slurm", "partition": "gpu", "cpus": 8}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline for Slurm, with resources of one stage, and a data stage that adds tasks."""
    monkeypatch.chdir(tmp_path)
    source = {"type": "files", "paths": ["a.jsonl"], "format": "prompt_completion"}
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "yes"}\n')
    (tmp_path / "recipe.yaml").write_text(json.dumps({"kind": "instructions", "sources": [source]}))
    return write({"executor": SLURM, "stages": {"one": {"executor": {"gpus": 4}}, "data": {"executor": {"tasks": 7}}}})


def write(runtime: dict[str, Any], name: str = "p.yaml", **top: Any) -> Path:
    raw = toy.pipeline() | {"runtime": runtime} | top
    raw["stages"] = raw["stages"] | {"data": {"recipe": "recipe.yaml"}}
    Path(name).write_text(json.dumps(raw))
    return Path(name)


def load(file: Path, *assignments: str, on: str | None = None) -> tuple[Pipeline, list[str]]:
    warnings: list[str] = []
    return Pipeline.load(file, assignments, on, warnings.append), warnings


def executors(pipeline: Pipeline) -> dict[str, Any]:
    return {name: pipeline.runtimes[name].executor for name in ("one", "two", "data")}


def test_a_file_s_executor_is_used_field_by_field(file: Path) -> None:
    pipeline, warnings = load(file)
    plain = SlurmExecutor(partition="gpu", cpus=8)
    assert executors(pipeline) == {
        "one": plain.model_copy(update={"gpus": 4}), "two": plain, "data": plain.model_copy(update={"tasks": 7}),
    }  # fmt: skip
    assert load(file, on="slurm")[0].raw == pipeline.raw and not warnings
    assert {node.key for node in pipeline} == {node.key for node in load(file, on="local")[0]}


@pytest.mark.parametrize(("on", "executor"), [("local", LocalExecutor()), ("ray", RayExecutor())])
def test_on_drops_fields_of_other_executor_with_warning(file: Path, on: str, executor: Any) -> None:
    pipeline, warnings = load(file, on=on)
    assert set(map(repr, executors(pipeline).values())) == {repr(executor)}
    assert warnings == [
        f"--on {on}: the file's fields for slurm are not used (runtime.executor, runtime.stages.one.executor, "
        "runtime.stages.data.executor)."
    ]


def test_on_keeps_the_fields_for_its_executor(file: Path) -> None:
    write({"stages": {"one": {"executor": {"gpus": 4}}}})
    pipeline, warnings = load(file, on="ray")
    assert executors(pipeline)["one"] == RayExecutor(gpus=4) and not warnings
    passes = {"name": "slurm", "partition": "cpu", "tasks": 9}
    write({"stages": {"data": {"executor": passes}}})
    assert executors(load(file, on="slurm")[0])["data"] == SlurmExecutor(partition="cpu", tasks=9)
    assert executors(load(file, on="local")[0])["data"] == SlurmExecutor(partition="cpu", tasks=9)
    pipeline, warnings = load(file, on="ray")
    assert executors(pipeline)["data"] == RayExecutor()
    assert warnings == ["--on ray: the file's fields for other executors are not used (runtime.stages.data.executor)."]


def test_on_comes_before_set(refused: Refused, file: Path) -> None:
    write({})
    assert load(file, "runtime.executor.partition=cpu", on="slurm")[0].config.runtime.executor.partition == "cpu"
    write({"executor": "slurm"})
    assert load(file, "runtime.executor.partition=cpu")[0].config.runtime.executor.partition == "cpu"
    assert load(file, "runtime.executor.cpus=2", on="ray")[0].config.runtime.executor == RayExecutor(cpus=2)
    refused(load, file, "runtime.executor=ray", on="slurm")


def test_extending_file_changes_fields_or_executor(file: Path) -> None:
    def extended(runtime: dict[str, Any]) -> Any:
        Path("child.yaml").write_text(json.dumps({"extends": "p.yaml", "runtime": runtime}))
        return load(Path("child.yaml"))[0].config.runtime.executor

    write({"executor": SLURM})
    assert extended({"executor": {"partition": "a100"}}) == SlurmExecutor(partition="a100", cpus=8)
    assert extended({"executor": "slurm"}) == SlurmExecutor(partition="gpu", cpus=8)
    assert extended({"executor": {"name": "ray", "gpus": 1}}) == RayExecutor(gpus=1)
    assert extended({"executor": "local"}) == LocalExecutor()


def test_data_stage_of_local_run_may_use_a_cluster(file: Path) -> None:
    write({"stages": {"data": {"executor": {"name": "slurm", "partition": "cpu", "tasks": 9}}}})
    pipeline, _ = load(file)
    assert executors(pipeline)["data"] == SlurmExecutor(partition="cpu", tasks=9)
    assert executors(pipeline)["one"] == pipeline.config.runtime.executor == LocalExecutor()


@pytest.mark.parametrize(
    "runtime",
    [
        {"stages": {"one": {"executor": {"name": "slurm", "gpus": 4}}}},
        {"executor": "slurm", "stages": {"one": {"executor": "local"}}},
        {"executor": "ray", "stages": {"one": {"executor": {"tasks": 3}}}},
        {"executor": "ray", "stages": {"data": {"executor": {"name": "slurm", "partition": "a", "tasks": 3}}}},
        {"stages": {"data": {"executor": "ray"}}},
    ],
)
def test_another_executor_for_a_stage_is_refused(refused: Refused, file: Path, runtime: dict[str, Any]) -> None:
    write(runtime)
    refused(load, file)
