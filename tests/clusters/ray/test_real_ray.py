"""Runs and sweeps on a real Ray cluster of two nodes on this machine, one of which dies."""

from __future__ import annotations

import json
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

from align import Pipeline
from align.runner.runner import run_pipeline
from align.store.store import Store
from tests.support import toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    from ray.cluster_utils import Cluster

    new_cluster = Cluster(initialize_head=True, head_node_args={**NODE, "resources": {"alpha": 1}})
    new_cluster.add_node(**NODE, resources={"beta": 1})
    new_cluster.wait_for_nodes(300)
    yield new_cluster
    new_cluster.shutdown()


class Runs:
    """A folder for pipelines and a store."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.store, self.address = folder, folder / "store", address

    def write(self, raw: dict[str, Any], name: str = "toy.yaml") -> str:
        (self.folder / name).write_text(yaml.safe_dump(raw, sort_keys=False))
        return name

    def pipeline(self, stages: dict[str, Any] | None = None, **changes: dict[str, Any]) -> str:
        runtime = {
            "executor": {"name": "ray", "address": self.address},
            "stages": {n: {"executor": block} for n, block in (stages or {}).items()},
        }
        return self.write(toy.pipeline(**changes) | {"runtime": runtime})

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli.main", *words, "--store", str(self.store)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip

    def align(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def record(self, stage: str) -> dict[str, Any]:
        (result,) = [artifact.record for artifact in Store.open(self.store).all() if artifact.stage == stage]
        return result

    def checkpoints(self) -> int:
        return toy.steps_kept(self.store, "one")


@pytest.fixture
def runs(cluster: Any, tmp_path: Path) -> Runs:
    return Runs(tmp_path, cluster.address)


def until(condition: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def test_stages_run_on_nodes_with_their_resources(runs: Runs) -> None:
    slow = {"one": {"pause": 1.0}}
    file = runs.pipeline({"one": {"resources": {"alpha": 1}}, "two": {"resources": {"beta": 1}}}, **slow)
    code, output = runs.align("run", file, "--on", "ray")
    assert code == 0, output
    assert "one    runs on" in output and "✓ total" in output and "Report: " in output
    plain = run_pipeline(Pipeline(toy.pipeline(**slow)), store=runs.folder / "plain")
    for stage, artifact in plain.artifacts.items():
        assert runs.record(stage)["key"] == artifact.record["key"]
        assert runs.record(stage)["metrics"] == artifact.record["metrics"]
    code, output = runs.align("run", file, "--on", "ray")
    assert code == 0 and output.count("cached") == 3


def test_a_failed_stage_ends_what_reads_it(runs: Runs) -> None:
    code, output = runs.align("run", runs.pipeline(one={"crash": "bug"}), "--on", "ray")
    assert code == 1, output
    assert "stage 'one' failed: ValueError: a bug" in output and "Log: " in output
    assert "stage 'total' did not start: its input 'one' failed." in output
    assert runs.record("two")["metrics"]["number"] == 2


def test_usr1_has_the_stages_save_and_ctrl_c_ends_them(runs: Runs) -> None:
    file = runs.pipeline(one={"steps": 100, "pause": 0.2, "stops": True})
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        before = runs.checkpoints()
        process = runs.start("run", file, "--on", "ray")
        until(lambda before=before: runs.checkpoints() >= before + 3)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == code, output
        assert "The same command continues." in output
    time.sleep(2)
    checkpoints = runs.checkpoints()
    time.sleep(1)
    assert runs.checkpoints() == checkpoints < 100  # nothing works on


def test_an_array_of_tasks_works_on_a_sweep(runs: Runs) -> None:
    runs.pipeline(two={"steps": 2, "pause": 0.3})
    sweep = {
        "name": "s", "pipeline": "toy.yaml", "space": {"stages.two.number": [1, 2, 3]}, "sampler": "grid",
        "maximize": "total.total",
    }  # fmt: skip
    code, output = runs.align("sweep", runs.write(sweep, "sweep.yaml"), "--on", "ray", "--workers", "2")
    assert code == 0, output
    assert "3 trials done" in output and "Best: trial 2; its run is s-2." in output


def sampled(runs: Runs, name: str, samplers: int, kill: bool = False) -> list[str]:
    """The texts that a stage has drawn, in a store of its own."""
    runtime = {
        "device": "cpu", "engine": {"name": "transformers", "batch_size": 4},
        "executor": {
            "name": "ray", "address": runs.address, "cpus": 0.5, "samplers": {"count": samplers, "cpus": 0.5},
        },
    }  # fmt: skip
    raw = {
        "name": name, "seed": 4, "runtime": runtime,
        "stages": {
            "model": {"source": "tiny"},
            "prompts": {"stage": "tests.support.stages.fixed_inputs:PROMPTS", "count": 24},
            "sample": {"policy": "model", "prompts": "prompts", "n": 2, "max_tokens": 48,
                       "score": "tests.support.stages.vowels:share", "precision": "float32"},
        },
    }  # fmt: skip
    runs.store = runs.folder / name
    process = runs.start("run", runs.write(raw))
    if kill:
        victims: list[int] = []

        def find() -> bool:
            lines = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
            victims[:] = [int(line.split()[0]) for line in lines if "ray::Shard.generate" in line]
            return bool(victims) or process.poll() is not None

        until(find)
        assert victims, "sampling was over before an engine could be killed"
        os.kill(victims[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    path = next(runs.store.glob("sample/*/samples.jsonl"))
    return path.read_text().splitlines()


def test_cluster_engines_equal_a_local_one_after_a_death(runs: Runs) -> None:
    alone = sampled(runs, "alone", 0)
    assert sampled(runs, "shared", 2) == alone
    assert sampled(runs, "killed", 2, kill=True) == alone


def test_data_builds_run_there_too(runs: Runs) -> None:
    pytest.importorskip("datatrove")
    rows = "".join(json.dumps({"prompt": f"q {index}", "completion": "yes"}) + "\n" for index in range(60))
    (runs.folder / "a.jsonl").write_text(rows)
    source = {"type": "files", "paths": ["a.jsonl"], "format": "prompt_completion"}
    runs.write({"kind": "instructions", "sources": [source], "steps": [{"type": "exact_duplicates"}]}, "recipe.yaml")
    actual = []
    block = {"name": "ray", "address": runs.address, "cpus": 0.5, "memory_gb": 0.5, "tasks": 2}
    runtimes = {"plain": {}, "everything": {"executor": block}, "tasks": {"stages": {"data": {"executor": block}}}}
    for name, runtime in runtimes.items():
        runs.store = runs.folder / name
        raw = {"name": name, "runtime": runtime, "stages": {"data": {"recipe": "recipe.yaml"}}}
        code, output = runs.align("run", runs.write(raw, f"{name}.yaml"))
        assert code == 0, output
        actual.append(json.loads(next(runs.store.glob("data/*/**/ledger.json")).read_text())["digests"])
    assert actual[0] == actual[1] == actual[2]


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
    process = runs.start("run", file, "--on", "ray", "--set", "runtime.stages.one.executor.wait=5")
    until(lambda: runs.checkpoints() >= 3)
    cluster.remove_node(node, allow_graceful=False)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1, output
    assert "stage 'one' failed: no node of the Ray cluster has what it asks for" in output, output
    assert runs.record("two")["metrics"]["number"] == 2
    file = runs.pipeline({"one": {"resources": {"either": 1}}}, one={"steps": 40, "pause": 0.5})
    code, output = runs.align("run", file, "--on", "ray")
    assert code == 0, output
    assert runs.record("one")["metrics"]["resumed_at"] >= 3
