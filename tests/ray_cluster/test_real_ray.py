"""Runs and sweeps on a real Ray cluster of two nodes on this machine, one of which dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.pipeline import Pipeline
from align.runner import run_pipeline
from align.store import Store
from tests import toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "resources": {"alpha": 1}})
    made.add_node(**NODE, resources={"beta": 1})
    made.wait_for_nodes(300)
    yield made
    made.shutdown()


class Runs:
    """A folder for pipelines and a store."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.store, self.address = folder, folder / "store", address

    def write(self, raw: dict[str, Any], name: str = "toy.yaml") -> str:
        (self.folder / name).write_text(yaml.safe_dump(raw, sort_keys=False))
        return name

    def pipeline(self, stages: dict[str, Any] | None = None, **changes: dict[str, Any]) -> str:
        runtime = {
            "ray": {"address": self.address},
            "stages": {n: {"ray": block} for n, block in (stages or {}).items()},
        }
        return self.write(toy.pipeline(**changes) | {"runtime": runtime})

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli", *words, "--store", str(self.store)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def align(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        said, _ = process.communicate(timeout=900)
        return process.returncode, said

    def record(self, stage: str) -> dict[str, Any]:
        (found,) = [one.record for one in Store.open(self.store).all() if one.stage == stage]
        return found

    def checkpoints(self) -> int:
        folders = self.store.glob("number/*.partial")
        return max((len(list(path.glob("checkpoints/step-*"))) for path in folders), default=0)


@pytest.fixture
def runs(cluster: Any, tmp_path: Path) -> Runs:
    return Runs(tmp_path, cluster.address)


def until(what: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def test_stages_run_where_their_resources_are_and_come_to_the_same(runs: Runs) -> None:
    file = runs.pipeline({"one": {"resources": {"alpha": 1}}, "two": {"resources": {"beta": 1}}})
    code, said = runs.align("run", file, "--on", "ray")
    assert code == 0, said
    assert "one    runs on" in said and "✓ total" in said and "Report: " in said
    plain = run_pipeline(Pipeline(toy.pipeline()), store=runs.folder / "plain")
    for stage, artifact in plain.artifacts.items():
        assert runs.record(stage)["key"] == artifact.record["key"]
        assert runs.record(stage)["metrics"] == artifact.record["metrics"]
    code, said = runs.align("run", file, "--on", "ray")
    assert code == 0 and said.count("cached") == 3


def test_a_failed_stage_ends_what_reads_it(runs: Runs) -> None:
    code, said = runs.align("run", runs.pipeline(one={"crash": "bug"}), "--on", "ray")
    assert code == 1, said
    assert "stage 'one' failed: ValueError: a bug" in said and "Log: " in said
    assert "stage 'total' was not begun: it reads 'one', which failed." in said
    assert runs.record("two")["metrics"]["number"] == 2


def test_usr1_has_the_stages_save_and_ctrl_c_ends_them(runs: Runs) -> None:
    file = runs.pipeline(one={"steps": 100, "pause": 0.2, "stops": True})
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        before = runs.checkpoints()
        process = runs.start("run", file, "--on", "ray")
        until(lambda before=before: runs.checkpoints() >= before + 3)
        process.send_signal(number)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == code, said
        assert "The same command continues." in said
    time.sleep(2)
    kept = runs.checkpoints()
    time.sleep(1)
    assert runs.checkpoints() == kept < 100  # nothing works on


def test_an_array_of_tasks_works_on_a_sweep(runs: Runs) -> None:
    runs.pipeline(two={"steps": 2, "pause": 0.3})
    sweep = {
        "name": "s", "pipeline": "toy.yaml", "space": {"stages.two.number": [1, 2, 3]}, "sampler": "grid",
        "maximise": "total.total",
    }  # fmt: skip
    code, said = runs.align("sweep", runs.write(sweep, "sweep.yaml"), "--on", "ray", "--workers", "2")
    assert code == 0, said
    assert "3 trials done" in said and "Best: trial 2; its run is s-2." in said


def test_a_node_that_dies_in_mid_stage(runs: Runs, cluster: Any) -> None:
    """Last: it takes a node away. The stage is tried again on the node that is left; one that only the dead node could
    hold ends with a message."""
    node = cluster.add_node(**NODE, resources={"gamma": 1, "either": 1})
    cluster.add_node(**NODE, resources={"either": 1})
    cluster.wait_for_nodes(300)
    file = runs.pipeline(
        {"one": {"resources": {"gamma": 0.001, "either": 1}}, "two": {"resources": {"beta": 1}}},
        one={"steps": 40, "pause": 0.5},
    )
    process = runs.start("run", file, "--on", "ray", "--set", "runtime.stages.one.ray.wait=5")
    until(lambda: runs.checkpoints() >= 3)
    cluster.remove_node(node, allow_graceful=False)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 1, said
    assert "stage 'one' failed: no node of the Ray cluster has what it asks for" in said
    assert runs.record("two")["metrics"]["number"] == 2
    file = runs.pipeline({"one": {"resources": {"either": 1}}}, one={"steps": 40, "pause": 0.5})
    code, said = runs.align("run", file, "--on", "ray")
    assert code == 0, said
    assert runs.record("one")["metrics"]["resumed_at"] >= 3
