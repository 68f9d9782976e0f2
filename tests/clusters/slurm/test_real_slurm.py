"""The same on a real Slurm of two nodes, which ``start_slurm.sh`` starts on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.clusters.slurm_submission import submissions
from align.runner.runner import run_pipeline
from align.store.store import Store
from tests.support import toy

REPOSITORY = Path(__file__).resolve().parents[3]
SUPPORT = REPOSITORY / "tests" / "support" / "clusters" / "slurm"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Cluster:
    """The running Slurm, and a folder for pipelines and a store."""

    def __init__(self, conf: Path, folder: Path) -> None:
        self.conf, self.folder, self.store = conf, folder, folder / "a store"

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def write(self, raw: dict[str, Any], name: str = "toy.yaml") -> str:
        (self.folder / name).write_text(yaml.safe_dump(raw, sort_keys=False))
        return name

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli.main", *words, "--store", str(self.store)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def align(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def artifact(self, stage: str) -> dict[str, Any]:
        (result,) = [entry.record for entry in Store.open(self.store).all() if entry.stage == stage]
        return result

    def checkpoints(self) -> int:
        return toy.steps_kept(self.store, "one")

    def state(self, job: int) -> str:
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").splitlines()[0]

    def job(self, stage: str) -> int:
        return next(submissions(Store.open(self.store))).job_of(stage).job


def until(condition: Any, seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while not (actual := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return actual


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {missing[0]} on this machine; `make slurm` installs Debian's Slurm")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SUPPORT / "start_slurm.sh", "start", folder], check=True, timeout=300)
    yield folder / "slurm.conf"
    subprocess.run([SUPPORT / "start_slurm.sh", "stop", folder], check=True, timeout=300)


@pytest.fixture
def cluster(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    new_cluster = Cluster(conf, tmp_path)
    yield new_cluster
    new_cluster.ask("scancel", "--user", new_cluster.ask("id", "-un"))
    until(lambda: not new_cluster.ask("squeue", "--noheader"))


SMALL = {"executor": {"name": "slurm", "partition": "cpu", "cpus": 1, "memory_gb": 1}}


def test_a_run_waits_for_what_it_reads_and_comes_to_the_same(cluster: Cluster) -> None:
    file = cluster.write(toy.pipeline(one={"pause": 0.5}) | {"runtime": SMALL})
    code, output = cluster.align("run", file, "--on", "slurm")
    assert code == 0, output
    assert "waits (Dependency)" in output and "runs on node" in output and "Report: " in output
    plain = run_pipeline(Pipeline(toy.pipeline(one={"pause": 0.5})), store=cluster.folder / "plain")
    for stage, artifact in plain.artifacts.items():
        assert cluster.artifact(stage)["key"] == artifact.record["key"]
        assert cluster.artifact(stage)["outputs"].keys() == artifact.record["outputs"].keys()
    assert "3 done" in cluster.align("status")[1]


def test_a_failed_stage_ends_what_reads_it(cluster: Cluster) -> None:
    file = cluster.write(toy.pipeline(one={"crash": "bug"}) | {"runtime": SMALL})
    code, output = cluster.align("run", file, "--on", "slurm")
    assert code == 1, output
    assert "stage 'one' failed: ValueError: a bug" in output and "Log: " in output
    assert "stage 'total' did not start: its input 'one' failed." in output
    assert cluster.state(cluster.job("total")) == "CANCELLED"
    assert cluster.artifact("two")["metrics"]["number"] == 2


def test_a_job_is_cancelled_and_the_next_run_goes_on(cluster: Cluster) -> None:
    file = cluster.write(toy.pipeline(one={"steps": 60, "pause": 0.5, "stops": True}) | {"runtime": SMALL})
    code, message = cluster.align("run", file, "--on", "slurm", "--detach")
    assert code == 0, message
    until(lambda: cluster.checkpoints() >= 3)
    job = cluster.job("one")
    message = cluster.align("status", "toy")[1]
    assert f"runs       job {job} on node" in message and "/60 steps" in message and "(Dependency)" in message
    assert f"job {job}" in cluster.align("cancel", "toy")[1]
    until(lambda: cluster.state(job) == "CANCELLED")
    assert "stopped" in cluster.align("status", "toy")[1]
    code, message = cluster.align("run", file, "--on", "slurm")
    assert code == 0, message
    assert cluster.artifact("one")["metrics"]["resumed_at"] >= 3


def test_preempted_job_saves_and_continues_later(cluster: Cluster) -> None:
    file = cluster.write(toy.pipeline(one={"steps": 60, "pause": 0.3, "stops": True}) | {"runtime": SMALL})
    process = cluster.start("run", file, "--on", "slurm")
    until(lambda: cluster.checkpoints() >= 3)
    urgent = cluster.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4",
        "--mem=100", f"--output={cluster.folder}/urgent.log", "--wrap=sleep 5",
    )  # fmt: skip
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "stopped as asked, at step" in output and "Its job is requeued." in output and "one    resumes" in output
    record = cluster.artifact("one")
    assert record["metrics"]["resumed_at"] >= 3 and len(record["attempts"]) == 2
    assert cluster.state(int(urgent)) == "COMPLETED"
    assert cluster.artifact("total")["metrics"] == {"total": 3}


def test_a_job_at_its_time_limit_goes_on_in_another_turn(cluster: Cluster) -> None:
    runtime = {"executor": {**SMALL["executor"], "time": "00:03:00", "grace": 30}}
    raw = toy.pipeline(one={"steps": 200, "pause": 1.0, "stops": True}) | {"runtime": runtime}
    raw["stages"] = {"one": raw["stages"]["one"]}
    code, output = cluster.align("run", cluster.write(raw), "--on", "slurm")
    assert code == 0, output
    assert "Its job is requeued." in output
    assert len(cluster.artifact("one")["attempts"]) >= 2


def test_an_array_works_on_a_sweep(cluster: Cluster) -> None:
    cluster.write(toy.pipeline(two={"steps": 2, "pause": 0.5}) | {"runtime": SMALL})
    sweep = {
        "name": "s", "pipeline": "toy.yaml", "space": {"stages.two.number": [1, 2, 3, 4]}, "sampler": "grid",
        "maximize": "total.total",
    }  # fmt: skip
    code, output = cluster.align("sweep", cluster.write(sweep, "sweep.yaml"), "--on", "slurm", "--workers", "2")
    assert code == 0, output
    assert "4 trials done" in output and "Best: trial 3; its run is s-3." in output
    folder = next(submissions(Store.open(cluster.store), "s")).folder
    logs = [(folder / f"worker-{index}.log").read_text() for index in range(2)]
    assert sum(log.count("✓ trial") for log in logs) == 4


def test_a_node_that_is_taken_down_and_comes_back(cluster: Cluster) -> None:
    raw = toy.pipeline(one={"steps": 60, "pause": 0.4}) | {"runtime": SMALL}
    process = cluster.start("run", cluster.write(raw), "--on", "slurm")
    until(lambda: cluster.checkpoints() >= 3)
    node = cluster.ask("squeue", "--noheader", f"--jobs={cluster.job('one')}", "--format=%N")
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert cluster.artifact("one")["metrics"]["resumed_at"] >= 3
    assert cluster.artifact("total")["metrics"] == {"total": 3}
    # a node whose daemon answers may have come back by itself, which Slurm then calls an invalid change
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, timeout=60)
    until(lambda: cluster.ask("sinfo", "--noheader", "--partition=cpu", "--states=idle", "--format=%D") == "2")


def test_a_node_that_dies_and_comes_back(cluster: Cluster) -> None:
    raw = toy.pipeline(one={"steps": 60, "pause": 0.4}) | {"runtime": SMALL}
    process = cluster.start("run", cluster.write(raw), "--on", "slurm")
    until(lambda: cluster.checkpoints() >= 3)
    job = cluster.job("one")
    number = cluster.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").removeprefix("node")
    daemon = int((cluster.conf.parent / f"slurmd{number}.pid").read_text())
    for line in cluster.ask(
        "ps", "-ww", "-eo", "pid,args"
    ).splitlines():  # as where the power fails: all of the job at once
        pid, _, words = line.strip().partition(" ")
        if f"slurmstepd: [{job}." in words or ("slurm_job" in words and str(cluster.store) in words):
            os.kill(int(pid), signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert cluster.artifact("one")["metrics"]["resumed_at"] >= 3
    subprocess.run([SUPPORT / "start_slurm.sh", "node", cluster.conf.parent, number], check=True)
    until(lambda: cluster.ask("sinfo", "--noheader", "--partition=cpu", "--states=idle", "--format=%D") == "2")


def test_a_stage_trains_on_two_nodes_and_one_node_finds_it_made(cluster: Cluster) -> None:
    raw = {
        "name": "two", "seed": 3,
        "runtime": {"device": "cpu", "launch": {"nodes": 2, "timeout": 600}, **SMALL},
        "stages": {
            "model": {"source": "tiny"},
            "rows": {"stage": "tests.support.training.row_stages:ROWS", "train": 24},
            "sft": {"model": "model", "data": "rows", "learning_rate": 1e-3, "batch_size": 12, "max_length": 128,
                    "precision": "float32", "max_steps": 3},
        },
    }  # fmt: skip
    code, output = cluster.align("run", cluster.write(raw), "--on", "slurm")
    assert code == 0, output
    assert f"job {cluster.job('sft')} runs on node[1-2]" in output
    raw["runtime"] = {"device": "cpu"}
    code, output = cluster.align("run", cluster.write(raw))
    assert code == 0 and output.count("cached") == 3, output
    alone = run_pipeline(Pipeline(raw), store=cluster.folder / "plain").metrics("sft")
    both = cluster.artifact("sft")["metrics"]
    for name in ("loss_first", "loss_last", "test_loss_after"):
        assert both[name] == pytest.approx(alone[name], abs=1e-4)


def test_real_slurm_s_refusal_precedes_submission(cluster: Cluster) -> None:
    raw = toy.pipeline() | {"runtime": {**SMALL, "stages": {"two": {"executor": {"cpus": 99}}}}}
    code, output = cluster.align("run", cluster.write(raw), "--on", "slurm")
    assert code == 2, output
    assert "stage 'two': Slurm refuses its job" in output and "runtime.stages.two.executor" in output
    assert cluster.ask("squeue", "--noheader") == ""
    code, output = cluster.align("run", "toy.yaml", "--on", "slurm", "--set", "runtime.executor.partition=cqu")
    assert "there is no partition 'cqu' in this cluster. Did you mean 'cpu'?" in output


def test_ordinary_jobs_of_data_builds_run_there_too(cluster: Cluster) -> None:
    pytest.importorskip("datatrove")
    rows = "".join(json.dumps({"prompt": f"q {index}", "completion": "yes"}) + "\n" for index in range(60))
    (cluster.folder / "a.jsonl").write_text(rows)
    source = {"type": "files", "paths": ["a.jsonl"], "format": "prompt_completion"}
    recipe = {"kind": "instructions", "sources": [source], "steps": [{"type": "exact_duplicates"}]}
    cluster.write(recipe, "recipe.yaml")
    raw = {"name": "build", "stages": {"data": {"recipe": "recipe.yaml"}}}
    actual = []
    block = {"name": "slurm", "partition": "cpu", "tasks": 2, "memory_gb": 1}
    runtimes = {"plain": {}, "jobs": {"executor": block}, "passes": {"stages": {"data": {"executor": block}}}}
    for name, runtime in runtimes.items():
        cluster.store = cluster.folder / name
        code, output = cluster.align("run", cluster.write(raw | {"runtime": runtime}, f"{name}.yaml"))
        assert code == 0, output
        actual.append(json.loads(next(cluster.store.glob("data/*/**/ledger.json")).read_text())["digests"])
    assert actual[0] == actual[1] == actual[2]
