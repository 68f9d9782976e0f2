"""Stages in several processes: what each is given, and how the stage ends when one of them dies, stops or is at fault.

The stage is a toy that meets the others at a barrier every step; the processes are real, started by torch's agent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.runtime import Runtime
from align.config.runtime.launch import LATE, LOST, LaunchConfig, is_head, symptom
from align.errors import StageFailed, UserError
from align.runner.listener import Listener
from align.runner.ranks import outcome, run_ranks
from align.runner.runner import Run, run_pipeline
from align.runner.stage_result import write_result
from align.store.retry import UNREACHABLE_STORE
from tests.support.refusals import Refused

pytestmark = pytest.mark.timeout(900)


class Heard(Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage_event(self, node: Any, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            self.warnings.append(event["message"])


def pipeline(processes: int = 2, timeout: float = 120, pause: float = 0.0, **config: Any) -> Pipeline:
    stages = {"ranks": {"stage": "tests.support.toy:RANKS", "crash": "step", "steps": 3, "pause": pause, **config}}
    launch = {"processes": processes, "timeout": timeout}
    return Pipeline({"name": "several", "runtime": {"device": "cpu", "launch": launch}, "stages": stages}, "p.yaml")


def run(tmp_path: Path, fault: str = "", **options: Any) -> Run:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ALIGN_TEST_FAULT", fault)
        return run_pipeline(pipeline(**options), store=tmp_path)


def partial(tmp_path: Path) -> Path:
    (result,) = (tmp_path / "ranks").glob("*.partial")
    return result


def test_ranks_share_the_cores_and_rank_0_writes_events(tmp_path: Path) -> None:
    messages = Heard()
    finished = run_pipeline(pipeline(), store=tmp_path, listener=messages)
    document = json.loads((finished.artifacts["ranks"].path / "ranks.json").read_text())
    cores = len(os.sched_getaffinity(0))
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert document == [{"RANK": "0", **same}, {"RANK": "1", **same}]
    assert finished.metrics("ranks") == {"rank": 0, "resumed_at": 0}
    assert messages.warnings == ["from rank 0"]
    log = (finished.artifacts["ranks"].path / "log.txt").read_text()
    assert "rank 0 is here" in log and "rank 1 is here" not in log


def test_a_killed_rank_ends_the_stage_which_says_so_and_resumes(refused: Refused, tmp_path: Path) -> None:
    refused(run, tmp_path, "kill 1")
    with pytest.MonkeyPatch.context():
        assert run(tmp_path, processes=1 + 2).metrics("ranks")["resumed_at"] == 1  # goes on, in another number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("user 1", UserError, "stage 'ranks': the dataset is empty after filtering."),
        ("bug 0", StageFailed, "rank 0 of 2: ValueError: a bug"),
        ("bug 1", StageFailed, "rank 1 of 2: ValueError: a bug"),
        ("exit 1", StageFailed, "rank 1 of 2 ended with exit code 9 and left no result"),
        ("kill 0", StageFailed, "rank 0 of 2 was killed by SIGKILL"),
    ],
)
def test_the_rank_at_fault_is_named(tmp_path: Path, fault: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        run(tmp_path, fault)
    assert words in str(caught.value)


@pytest.mark.slow
def test_rank_that_stops_ends_the_stage_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        run(tmp_path, "stop 1", timeout=20)
    assert "rank 0 of 2 waited 20 seconds in vain for rank 1 (runtime.launch.timeout)" in str(caught.value)
    assert run(tmp_path).metrics("ranks")["resumed_at"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_runner_ends_all_ranks(tmp_path: Path, number: int) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps({**pipeline(pause=1.0, steps=600).raw}))
    environment = {**os.environ, "ALIGN_TEST_FAULT": ""}
    command = [sys.executable, "-m", "align.cli.main", "run", str(file), "--store", str(tmp_path / "store")]
    # A shell that starts a job in the background has it ignore SIGINT, and so would what it starts.
    process = subprocess.Popen(
        command, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    pids = _wait_for_ranks(tmp_path / "store", 2)
    process.send_signal(number)
    process.wait(60)
    _gone(pids)


@pytest.mark.slow
def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    def kill() -> None:
        (rank,) = _wait_for_ranks(tmp_path, 2)[:1]
        parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageFailed, match="its process was killed"):
        run(tmp_path, pause=1.0, steps=600)
    killer.join()
    _gone([int(file.read_text()) for file in (partial(tmp_path) / "ranks").glob("*.pid")])


def _wait_for_ranks(store: Path, count: int) -> list[int]:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if len(list(store.glob("ranks/*.partial/checkpoints/step-*"))):
            return [int(file.read_text()) for file in sorted(store.glob("ranks/*.partial/ranks/*.pid"))][:count]
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def _gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"of {pids} some are still there"
        time.sleep(0.1)


def left(folder: Path, number: int, **result: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_result(folder / f"{number}.json", result)


def test_a_fault_is_told_from_its_consequences(tmp_path: Path) -> None:
    lost = {"status": "failed", "message": "RuntimeError: connection reset", "symptom": LOST}
    late = {**lost, "symptom": LATE}
    ranks = tmp_path / "ranks"
    left(ranks, 0, **lost)
    assert "rank 1 of 2 was killed by SIGABRT, so" in outcome(ranks, 2, {0: 1, 1: -6}, 9)["message"]
    left(ranks, 0, **late)
    assert "rank 0 of 2 waited 9 seconds in vain for rank 1" in outcome(ranks, 2, {0: 1, 1: -9}, 9)["message"]
    left(ranks, 1, status="refused", message="no rows")
    assert outcome(ranks, 2, {0: 1, 1: 2}, 9)["message"] == "no rows"
    left(ranks, 1, status="stopped", message="stopped as asked, at step 3 of 9.")
    actual = outcome(ranks, 2, {0: 1, 1: 75}, 9)
    assert (actual["status"], actual["message"]) == ("stopped", "stopped as asked, at step 3 of 9.")
    left(ranks, 1, status=UNREACHABLE_STORE, message="the store could not be reached")
    assert outcome(ranks, 2, {0: 1, 1: 74}, 9)["status"] == UNREACHABLE_STORE
    left(ranks, 0, status="done", metrics={"a": 1}, peak_memory_bytes=5, versions={"torch": "2"})
    left(ranks, 1, status="done", metrics={"a": 2}, peak_memory_bytes=7, versions={})
    actual = outcome(ranks, 2, {}, 9)
    assert (actual["status"], actual["metrics"], actual["peak_memory_bytes"]) == ("done", {"a": 1}, 7)
    assert "ended without a result" in outcome(tmp_path / "none", 2, {}, 9)["message"]


@pytest.mark.parametrize(
    ("text", "actual"),
    [
        ("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation", LATE),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", LATE),
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:50: Connection reset by peer", LOST),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:50", LOST),
        ("the server at http://127.0.0.1:1 timed out", None),
        ("CUDA out of memory", None),
    ],
)
def test_what_only_says_that_another_rank_is_gone_is_known(text: str, actual: str | None) -> None:
    assert symptom(RuntimeError(text)) == actual


def test_the_first_node_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert is_head()
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert not is_head()
    monkeypatch.setenv("ALIGN_NODE_RANK", "0")
    assert is_head()


SFT = {"model": {"source": "tiny"}, "data": {"recipe": "data_recipes/embedded.yaml"}}
TRAINED = {"model": "model", "data": "data", "learning_rate": 1e-3}


def test_nodes_without_rendezvous_are_refused_outside_slurm(refused: Refused, tmp_path: Path) -> None:
    pipeline = Pipeline({"name": "x", "runtime": {"launch": {"nodes": 2}}, "stages": {**SFT, "sft": TRAINED}}, "p.yaml")
    refused(run_pipeline, pipeline, store=tmp_path / "store")


@pytest.mark.parametrize(
    ("runtime", "sft"),
    [
        ({"launch": {"processes": 0}}, {}),
        ({"launch": {"strategy": "fdsp2"}}, {}),
        ({"launch": {"fsdp": {"offload": True}}}, {}),
        ({"stages": {"data": {"launch": {"processes": 2}}}}, {}),
        ({"launch": {"processes": 3}}, {}),
        ({"launch": {"processes": 2}}, {"micro_batch_size": 16}),
        (
            {"stages": {"sft": {"launch": {"processes": 2, "strategy": "fsdp2"}}}},
            {"tuning": {"method": "qlora", "rank": 4}},
        ),
        ({"launch": {"processes": 2, "strategy": "fsdp2"}}, {"tuning": {"method": "full", "unfreeze": {"at": {0: 1}}}}),
    ],
)
def test_what_cannot_be_shared_out_is_refused(refused: Refused, runtime: dict[str, Any], sft: dict[str, Any]) -> None:
    stages = {**SFT, "sft": {**TRAINED, **sft}}
    refused(Pipeline, {"name": "x", "runtime": runtime, "stages": stages}, "p.yaml")


def test_a_stages_processes_keep_the_runs_strategy() -> None:
    runtime = {"launch": {"processes": 4, "strategy": "fsdp2"}, "stages": {"sft": {"launch": {"processes": 2}}}}
    launch = Pipeline({"name": "x", "runtime": runtime, "stages": {**SFT, "sft": TRAINED}}).runtimes["sft"].launch
    assert launch == LaunchConfig(processes=2, strategy="fsdp2")


def test_node_with_successful_ranks_needs_no_first_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first node's runner may have moved the stage's folder to its place by then."""
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *agent: lambda *command: {})
    runtime = Runtime.model_validate({"launch": {"nodes": 2, "processes": 1, "rendezvous": "127.0.0.1:29500"}})
    with monkeypatch.context() as patch:
        patch.setenv("ALIGN_NODE_RANK", "1")
        assert run_ranks(tmp_path, runtime) == {"status": "done", "metrics": {}}
    result = run_ranks(tmp_path, runtime)
    assert result is not None and result["status"] == "failed"


@pytest.mark.slow
def test_two_nodes_meet_and_the_first_one_writes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pipeline().raw
    raw["runtime"]["launch"] = {"processes": 1, "nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}", "timeout": 240}
    raw["stages"]["ranks"]["crash"] = ""
    second_node: list[subprocess.Popen[bytes]] = []

    class Second(Listener):
        def stage_started(self, node: Any, folder: Path, resumed: bool) -> None:
            environment = {**os.environ, "ALIGN_NODE_RANK": "1"}
            command = [sys.executable, "-m", "align.runner.worker", str(folder)]
            second_node.append(subprocess.Popen(command, env=environment))

    finished = run_pipeline(Pipeline(raw, "p.yaml"), store=tmp_path, listener=Second())
    assert second_node[0].wait(120) == 0
    document = json.loads((finished.artifacts["ranks"].path / "ranks.json").read_text())
    assert [(each["RANK"], each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) for each in document] == [
        ("0", "2", "1"), ("1", "2", "1"),
    ]  # fmt: skip
    assert finished.metrics("ranks")["rank"] == 0


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
