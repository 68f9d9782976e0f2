"""A stage's task without Ray: it is a function of plain values. And what is refused before anything starts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.cli import run
from align.clusters import ray as ray_tasks
from align.clusters.follow import JobFollower, JobResult, JobState, write_note
from align.clusters.ray import RayQueue, StageTask, run_stage_task
from align.config.runtime.executor import RayExecutor
from align.errors import StageFailed, UserError
from align.extensions.sweep.config import SweepConfig
from align.extensions.sweep.on_cluster import run_worker_task
from align.inference import ray_client
from align.runner.listener import Listener
from align.runner.open_store import Opening
from align.runner.runner import Run, RunOptions
from align.store.record import MARKER
from align.store.store import Store
from tests.support import toy
from tests.support.sweep import toy_sweep


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # tasks leave this folder, toys are in it
    (tmp_path / "said").mkdir()
    return tmp_path


def work(folder: Path, stage: str, raw: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    raw = raw or toy.pipeline()
    store = Store.open(folder / "store")
    task = StageTask(
        raw,
        "toy.yaml",
        str(folder),
        {},
        asdict(Opening.of(store)),
        str(folder / "said"),
        stage,
        Pipeline(raw).nodes[stage].key,
    )
    return {**asdict(task), **fields}


def said(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "said" / f"{stage}.json").read_text())


def test_a_task_makes_its_stage_and_says_so(folder: Path) -> None:
    assert [run_stage_task(work(folder, name)) for name in ("one", "two")] == ["done", "done"]
    assert run_stage_task(work(folder, "total"), "done", "done") == "done"
    assert said(folder, "total")["status"] == "done"
    actual = {artifact.stage: artifact.record for artifact in Store.open(folder / "store").all()}
    assert actual["total"]["metrics"] == {"total": 3}
    assert run_stage_task(work(folder, "total"), "done", "failed") == "skipped"


def test_task_finds_modules_in_folders_of_other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("ALIGN_MODULE_FOLDERS", "")
    run_stage_task(work(folder, "one", module_folders=[str(folder / "base")]))
    assert str(folder / "base") in sys.path and os.environ["ALIGN_MODULE_FOLDERS"] == str(folder / "base")


def test_a_stage_that_fails_says_why_and_where_its_log_is(folder: Path) -> None:
    assert run_stage_task(work(folder, "one", toy.pipeline(one={"crash": "bug"}))) == "failed"
    assert said(folder, "one")["message"] == "ValueError: a bug"
    assert "Traceback" in Path(said(folder, "one")["log"]).read_text()
    assert run_stage_task(work(folder, "one", toy.pipeline(one={"crash": "user"}))) == "refused"
    assert said(folder, "one")["message"] == "the dataset is empty after filtering."


def test_a_node_without_the_store_or_with_other_files_says_so(folder: Path) -> None:
    elsewhere = asdict(Opening(str(folder / "elsewhere")))
    assert "does not see the store" in run_stage_task(work(folder, "one", store=elsewhere))
    assert run_stage_task(work(folder, "one", key="0" * 64)) == "refused"
    assert "All nodes must see the same files" in said(folder, "one")["message"]


def test_node_without_folder_or_intact_store_leaves_a_note(folder: Path) -> None:
    assert run_stage_task(work(folder, "one", base=str(folder / "gone"))) == "refused"
    assert f"does not see the folder {folder / 'gone'} (No such file or directory)" in said(folder, "one")["message"]
    task = work(folder, "one")
    (folder / "store" / MARKER).write_text("{")
    assert run_stage_task(task) == "refused"
    assert MARKER in said(folder, "one")["message"]


def test_a_stage_is_made_anew_once(folder: Path) -> None:
    run_stage_task(work(folder, "one"))
    (before,) = Store.open(folder / "store").all()
    again = work(folder, "one", force=True, replaces=before.record["created"])
    assert run_stage_task(again) == "done"
    (after,) = Store.open(folder / "store").all()
    assert after.record["created"] > before.record["created"]
    assert run_stage_task(again) == "done"  # as a node's death right after the end would have it
    assert Store.open(folder / "store").all()[0].record["created"] == after.record["created"]


def test_tasks_of_runs_and_sweeps_open_the_store_of_the_run(folder: Path, address: str) -> None:
    store = Opening(str(folder / "store"), lease=5, patience=3, remote=address)
    assert run_stage_task(work(folder, "one", store=asdict(store))) == "done"
    assert [record["stage"] for record in store.open().remote.all()] == ["one"]
    config = SweepConfig.model_validate(
        {"name": "s", "pipeline": "p.yaml", "space": {"stages.ppo.height": [0.5]}, "sampler": "grid",
         "maximize": "ppo.gold"}
    )  # fmt: skip
    toy_sweep.write(folder)
    task = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "where": "s.yaml",
        "assignments": [],
        "on": None,
    }
    assert run_worker_task({**task, "store": asdict(store), "base": str(folder)}, 1) == (0, "")
    assert {record["stage"] for record in store.open().remote.all()} == {"one", "ppo", "evaluate"}


def test_without_ray_or_without_a_cluster_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        @staticmethod
        def init(**_: Any) -> None:
            raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setitem(sys.modules, "ray", Ray)
    remedy = r"no Ray cluster answers at 'auto' .*Start one with `ray start --head`"
    with pytest.raises(UserError, match=remedy), ray_client.connected("auto"):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed here: pip install 'align-pipeline\[ray\]'"):
        ray_client.require_ray()


class NoNode:
    """A cluster whose nodes have one core and no more."""

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "a100": 1.0}}]

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return (references, []) if self.cancelled else ([], references)

    class exceptions:
        class TaskCancelledError(Exception): ...

        RayTaskError = RayError = TaskCancelledError

    def get(self, reference: Any) -> Any:
        raise self.exceptions.TaskCancelledError

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled = True

    cancelled = False


def test_a_stage_that_no_node_could_hold_is_given_up_in_time(folder: Path) -> None:
    block = RayExecutor(memory_gb=2, resources={"a100": 1})
    assert ray_client.required_resources(block) == {"CPU": 1, "a100": 1, "memory": 2 * 2**30}
    assert ray_client.could_hold(NoNode(), RayExecutor())
    assert not ray_client.could_hold(NoNode(), RayExecutor(resources={"a100": 1}))
    runtime = {"executor": "ray", "stages": {"one": {"executor": {"resources": {"a100": 1}, "wait": 0}}}}
    pipeline = Pipeline({"name": "t", "runtime": runtime, "stages": {"one": toy.pipeline()["stages"]["one"]}})
    queue = RayQueue(NoNode(), pipeline, Store.open(folder / "store"), folder / "said", {"one": object()}, every=0)
    with pytest.raises(StageFailed, match=r"no node of the Ray cluster has what it asks for \(CPU 1, a100 1\)"):
        JobFollower(pipeline, queue.store, ["one"], queue, Listener()).follow()


class Ended:
    """A cluster whose only task has ended with an error."""

    class exceptions:
        class RayError(Exception): ...

        class TaskCancelledError(RayError): ...

        class RayTaskError(RayError): ...

        class WorkerCrashedError(RayError): ...

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Any) -> Any:
        raise self.error("Traceback\nOSError: no space")


@pytest.mark.parametrize(
    ("error", "description", "remedy"),
    [
        (Ended.exceptions.TaskCancelledError, "it was cancelled", ""),
        (Ended.exceptions.RayTaskError, "its task failed: OSError: no space", ""),
        (
            Ended.exceptions.WorkerCrashedError,
            "its worker or its node died (WorkerCrashedError), as often as it may be tried again",
            "Raise runtime.stages.one.executor.retries (now 3).",
        ),
    ],
)
def test_more_retries_are_the_remedy_for_dead_workers_alone(
    folder: Path, error: type[Exception], description: str, remedy: str
) -> None:
    pipeline = Pipeline(toy.pipeline() | {"runtime": {"executor": "ray"}})
    queue = RayQueue(Ended(error), pipeline, Store.open(folder / "store"), folder / "said", {"one": object()}, every=0)
    assert queue.query(["one"])["one"] == JobState("over", description, remedy)


def test_a_stage_whose_node_died_is_not_taken_to_run(folder: Path) -> None:
    """Its task has to begin anew, and there may be no node for it; what it said last is still in its file."""
    nodes = [{"NodeID": "f00d", "Alive": True, "Resources": {"CPU": 1.0, "a100": 1.0}},
             {"NodeID": "c0de", "Alive": True, "Resources": {"CPU": 1.0}}]  # fmt: skip
    cluster = NoNode()
    cluster.nodes = lambda: nodes  # type: ignore[method-assign]
    runtime = {"executor": "ray", "stages": {"one": {"executor": {"resources": {"a100": 1}, "wait": 0}}}}
    pipeline = Pipeline({"name": "t", "runtime": runtime, "stages": {"one": toy.pipeline()["stages"]["one"]}})
    queue = RayQueue(cluster, pipeline, Store.open(folder / "store"), folder / "said", {"one": object()}, every=0)
    write_note(folder / "said" / "one.json", JobResult("runs", "host", node="f00d"))
    assert queue.query(["one"])["one"].state == "runs"
    nodes[0]["Alive"] = False
    with pytest.raises(StageFailed, match="no node of the Ray cluster has what it asks for"):
        JobFollower(pipeline, queue.store, ["one"], queue, Listener()).follow()


def test_a_run_on_ray_holds_a_lease_on_what_its_tasks_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(folder / "store")
    calls: list[Any] = []

    class Followed:
        def __init__(self, *arguments: Any) -> None:
            pass

        def follow(self) -> Run:
            calls.extend(store.leases.uses())
            return Run(store)

    monkeypatch.setattr(ray_client, "require_ray", lambda: None)
    monkeypatch.setattr(ray_client, "connected", lambda address: contextlib.nullcontext("ray"))
    monkeypatch.setattr(ray_client, "start", lambda *arguments: "reference")
    monkeypatch.setattr(ray_tasks, "JobFollower", Followed)
    pipeline = Pipeline(toy.pipeline() | {"runtime": {"executor": "ray"}})
    assert run.run_on_ray(pipeline, RunOptions(store), json=True) == 0
    assert pipeline.run(store=store).store is store  # a script's way to the same
    assert [(uses.run, sorted(uses.stages)) for uses in calls] == 2 * [("toy", ["one", "total", "two"])]
    assert store.leases.uses() == []
