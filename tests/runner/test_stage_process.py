"""Stages that are forked from a process with the libraries: as those that the interpreter starts, in every way."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from align import Pipeline
from align.config.runtime import Runtime
from align.pipeline.pipeline import Node
from align.pipeline.process_limits import SLEEPING, SPINNING
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner import fork_server, runner, worker
from align.runner.fork_server import OFF, ForkedProcess, ForkServer
from align.runner.listener import Listener
from align.runner.runner import run_pipeline
from align.runner.stage_process import (
    forked_stages,
    is_importing,
    shorten_log,
    stage_environment,
    start_stage,
    this_thread,
)
from align.scoring.functions import ScoreFailed
from tests.support import toy
from tests.support.processes import command_of, descendants, is_alive
from tests.support.refusals import Refused
from tests.support.runs import wait_for

pytestmark = pytest.mark.skipif(not ForkServer.is_possible(), reason="only Linux forks a process with its libraries")
FORKED_STAGES = runner._forked_stages
WORKER = [sys.executable, "-m", "align.runner.worker"]


LIBRARY = "datasets"
"""What the servers of these tests import; a stage's record says that it was there."""


@pytest.fixture(autouse=True)
def without_the_tests_own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start their servers themselves, if they do (tests/conftest.py)."""
    monkeypatch.setattr(runner, "_forked_stages", FORKED_STAGES)
    monkeypatch.setattr(this_thread, "server", None)


def start_server() -> ForkServer:
    """Start a server, and wait until it is ready."""
    server = ForkServer(stage_environment(), None, [LIBRARY])
    wait_for(lambda: server.serves([*WORKER, "folder"], stage_environment(), None))
    return server


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ForkServer]:
    server = start_server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> ForkServer:
    """A server from which stages without settings are forked."""
    monkeypatch.setattr(this_thread, "server", shared_server)
    return shared_server


def run_surroundings(store: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Run a stage that writes its environment; return that, and the artifact's record."""
    raw = {"name": "toy", "stages": {"env": {"stage": "tests.support.toy:ENV"}}}
    artifact = run_pipeline(Pipeline(raw), store=store).artifacts["env"]
    return json.loads((artifact.path / "environment.json").read_text()), artifact.record


def test_a_forked_stage_is_as_one_that_the_interpreter_starts(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, record = run_surroundings(tmp_path / "forked")
    assert LIBRARY in record["packages"], "the interpreter has started it"
    monkeypatch.setattr(this_thread, "server", None)
    expected_environment, expected = run_surroundings(tmp_path / "started")
    assert LIBRARY not in expected["packages"]
    assert environment == expected_environment
    for name in ("key", "config", "metrics", "inputs", "parts", "source"):
        assert record[name] == expected[name]


def test_a_forked_stage_that_is_killed_resumes(refused: Refused, server: ForkServer, tmp_path: Path) -> None:
    raw = toy.pipeline(one={"crash": "kill"})
    refused(lambda: run_pipeline(Pipeline(raw), store=tmp_path))
    run = run_pipeline(Pipeline(raw), store=tmp_path)
    assert run.metrics("one") == {"number": 1, "resumed_at": 2, "tokens": 7}
    assert LIBRARY in run.artifact("one").record["packages"]
    assert len((run.artifact("one").path / "log.txt").read_text().splitlines()) == 2  # a line for each attempt


@pytest.mark.parametrize(
    "crash",
    [
        "user",
        "bug",
        "exit",
    ],
)
@pytest.mark.usefixtures("server")
def test_a_forked_stage_fails_as_others_do(refused: Refused, tmp_path: Path, crash: str) -> None:
    refused(lambda: run_pipeline(Pipeline(toy.pipeline(one={"crash": crash})), store=tmp_path))
    (log,) = tmp_path.glob("number/*.partial/log.txt")
    assert ("Traceback" in log.read_text()) == (crash == "bug")


@pytest.mark.usefixtures("server")
def test_the_exit_code_and_the_name_of_a_forked_process(tmp_path: Path) -> None:
    (tmp_path / "work.json").write_text("{}")  # refused
    with (tmp_path / "log.txt").open("wb") as log:
        process = start_stage([*WORKER, str(tmp_path)], stage_environment(), None, log.fileno())
    assert isinstance(process, ForkedProcess)
    assert process.wait(20) == 2
    assert process.poll() == process.returncode == 2


class Process(Listener):
    """Looks at the process of the first stage that reports, and may end what is above it."""

    def __init__(self, kill: int | None = None) -> None:
        self.kill, self.command, self.session = kill, "", 0

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        if self.command:
            return
        # The stage is the youngest of the family; a server of other tests may be in it, too.
        stage = max(psutil.Process().children(recursive=True), key=psutil.Process.create_time)
        self.command, self.session = command_of(stage), os.getsid(stage.pid) - stage.pid
        if self.kill is not None:
            os.kill(self.kill, signal.SIGKILL)


def test_a_forked_process_names_its_folder_and_leads_a_session(server: ForkServer, tmp_path: Path) -> None:
    pytest.importorskip("setproctitle")
    listener = Process()
    run_pipeline(Pipeline(toy.pipeline(one={"pause": 0.2})), store=tmp_path, listener=listener)
    assert f"align.runner.worker {tmp_path}/number/" in listener.command
    assert listener.session == 0


def test_stage_ends_with_its_fork_server(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    monkeypatch.setattr(this_thread, "server", server)
    raw = toy.pipeline(one={"pause": 0.2, "steps": 6})
    refused(lambda: run_pipeline(Pipeline(raw), store=tmp_path, listener=Process(kill=server.process.pid)))
    run = run_pipeline(Pipeline(raw), store=tmp_path)
    server.close()
    assert run.metrics("one")["resumed_at"] >= 1
    assert LIBRARY not in run.artifact("one").record["packages"]


def test_a_killed_runner_takes_server_and_stage_along(tmp_path: Path) -> None:
    raw = toy.pipeline(one={"pause": 0.1, "steps": 100})
    script = f"""
import time
from align import Pipeline
from align.runner.fork_server import ForkServer
from align.runner.stage_process import stage_environment, this_thread
server = this_thread.server = ForkServer(stage_environment(), None, ["numpy"])
while not server.serves({[*WORKER, ""]!r}, stage_environment(), None): time.sleep(0.05)
Pipeline({raw!r}).run(store={str(tmp_path)!r})
"""
    runner = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    wait_for(lambda: list(tmp_path.glob("number/*.partial/checkpoints/step-0")))
    family = descendants(runner.pid)
    assert len(family) == 2  # the server and the stage
    runner.kill()
    runner.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if is_alive(process)]


def test_an_interrupt_ends_a_forked_stage(server: ForkServer, tmp_path: Path) -> None:
    class Interrupt(Listener):
        def stage_event(self, node: Node, event: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(Pipeline(toy.pipeline(one={"pause": 0.2, "steps": 100})), store=tmp_path, listener=Interrupt())
    assert not psutil.Process(server.process.pid).children()


@pytest.mark.usefixtures("server")
def test_forked_stage_gets_the_runner_s_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_TEST_VALUE", "from the runner")
    monkeypatch.delenv("ALIGN_SERVER_KEY")
    environment, record = run_surroundings(tmp_path)
    assert LIBRARY in record["packages"]
    assert environment["ALIGN_TEST_VALUE"] == "from the runner"
    assert "ALIGN_SERVER_KEY" not in environment


def test_stage_with_other_settings_is_not_forked(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, environment = [*WORKER, "folder"], stage_environment()
    assert server.serves(command, environment, None)
    assert not server.serves(command, environment, 1)
    assert not server.serves(command, environment | {"HF_HOME": "elsewhere"}, None)
    assert not server.serves(["srun", *command], environment, None)
    monkeypatch.chdir(tmp_path)
    assert not server.serves(command, environment, None)


# --- the branch with vLLM ---


def import_stand_in() -> None:
    """Stands in for the import of vLLM."""
    sys.modules["vllm"] = ModuleType("vllm")


def import_nothing() -> None:
    raise ImportError("libmissing.so: cannot open shared object file")


def run_branched(store: Path, monkeypatch: pytest.MonkeyPatch, samples: bool) -> dict[str, str]:
    """Run a stage of a kind that samples or does not; return the packages that its process had."""
    monkeypatch.setattr(toy, "NUMBER", replace(toy.NUMBER, samples=samples))
    raw = {"name": "toy", "stages": {"one": {"stage": "tests.support.toy:NUMBER"}}}
    packages: dict[str, str] = run_pipeline(Pipeline(raw), store=store).artifacts["one"].record["packages"]
    return packages


@pytest.fixture
def branched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ForkServer]]:
    """A function that starts a server with a branch that calls ``importer``, a function of this file."""
    servers: list[ForkServer] = []

    def start(importer: str) -> ForkServer:
        monkeypatch.setattr("align.runner.fork_server.VLLM", f"{__name__}:{importer}")
        server = start_server()
        server.start_branch()
        monkeypatch.setattr(this_thread, "server", server)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


def test_only_stages_that_sample_use_the_branch(
    branched: Callable[[str], ForkServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = branched("import_stand_in")
    assert server.branch is not None
    wait_for(server.branch.is_ready)
    assert {LIBRARY, "vllm"} <= set(run_branched(tmp_path / "samples", monkeypatch, samples=True))
    packages = run_branched(tmp_path / "trains", monkeypatch, samples=False)
    assert LIBRARY in packages and "vllm" not in packages
    monkeypatch.setattr(Runtime, "may_open_vllm", False)
    packages = run_branched(tmp_path / "servers", monkeypatch, samples=True)
    assert LIBRARY in packages and "vllm" not in packages


def test_a_branch_that_cannot_import_vllm_is_done_without(
    branched: Callable[[str], ForkServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = branched("import_nothing")
    assert server.branch is not None
    control = server.branch.control
    wait_for(lambda: select.select([control], [], [], 0)[0])  # it has ended
    packages = run_branched(tmp_path, monkeypatch, samples=True)
    assert LIBRARY in packages and "vllm" not in packages


def test_a_branch_ends_with_its_server(branched: Callable[[str], ForkServer]) -> None:
    server = branched("import_stand_in")
    assert server.branch is not None
    wait_for(server.branch.is_ready)
    (branch,) = descendants(server.process.pid)
    server.close()
    wait_for(lambda: not is_alive(branch))


@pytest.mark.parametrize(
    ("engine", "installed", "expected"),
    [
        ("auto", True, True),
        ("vllm", True, True),
        ("transformers", True, False),
        ("auto", False, False),
    ],
)
def test_a_run_has_a_branch_where_a_stage_may_open_vllm(
    engine: str, installed: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Stop

    branches: list[ForkServer] = []
    monkeypatch.setattr(ForkServer, "start_branch", lambda self: branches.append(self))
    find_spec, vllm = importlib.util.find_spec, ModuleSpec("vllm", None) if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: vllm if name == "vllm" else find_spec(name))
    monkeypatch.setattr(runner, "_run_stages", stop)
    smoke = Pipeline.load("pipelines/smoke.yaml").set(f"runtime.engine.name={engine}")
    with pytest.raises(Stop):
        run_pipeline(smoke, store=tmp_path)
    assert bool(branches) == expected


def test_a_server_that_is_not_ready_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_thread, "server", None)
    with forked_stages(None):
        started = this_thread.server
        assert started is not None
        with forked_stages(None):
            assert this_thread.server is started
        run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    assert "torch" not in run.artifact("one").record["packages"]
    assert this_thread.server is None
    assert started.process.returncode == -signal.SIGKILL


def test_stages_of_a_run_share_the_choice_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_thread, "server", None)
    for variable in SPINNING:
        monkeypatch.delenv(variable, raising=False)
    with forked_stages(None):
        chosen = {name: stage_environment()[name] for name in SPINNING}
        assert chosen in (SPINNING, SLEEPING)  # another run may be on this machine
        assert this_thread.server is not None and chosen.items() <= this_thread.server.environment.items()
    assert not SPINNING.keys() & stage_environment().keys()


class Waiting(Listener):
    """Lets the server's imports go on once the stage has started, or asks the run to stop."""

    def __init__(self, go_on: Path | None, stop: StopRequest | None = None) -> None:
        self.go_on, self.stop = go_on, stop

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        threading.Timer(0.3, self.act).start()

    def act(self) -> None:
        if self.go_on is not None:
            self.go_on.touch()
        if self.stop is not None:
            self.stop.request()


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server whose imports end once the file exists, and a kind of stage that loads models."""
    (tmp_path / "slow_import.py").write_text(
        "import pathlib, time\n"
        f"while not pathlib.Path({str(tmp_path / 'go_on')!r}).exists(): time.sleep(0.02)\n"
        f"import {LIBRARY}\n"
    )
    monkeypatch.setattr("align.runner.stage_process.HEAD_START_SECONDS", 0.0)
    monkeypatch.setattr(toy, "NUMBER", replace(toy.NUMBER, estimator="never:called"))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    server = ForkServer(stage_environment() | {"PYTHONPATH": path}, None, ["slow_import"])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(this_thread, "server", server)
    yield tmp_path / "go_on"
    server.close()


def test_stage_that_loads_models_waits_for_imports(importing: Path, tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path / "store", listener=Waiting(importing))
    assert LIBRARY in run.artifact("one").record["packages"]


@pytest.mark.timeout(60)
def test_a_run_that_is_stopped_no_longer_waits_for_imports(
    importing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imports never end here: a run that went on waiting would, too."""
    monkeypatch.setattr("align.runner.stage_process.IMPORT_SECONDS", float("inf"))
    stop = StopRequest()
    raw = toy.pipeline(one={"pause": 0.1, "steps": 100})
    with pytest.raises(Stopped):
        run_pipeline(Pipeline(raw), store=tmp_path / "store", listener=Waiting(None, stop), stop=stop)


def test_sigterm_during_imports_ends_the_run(importing: Path, tmp_path: Path) -> None:
    class Terminating(Waiting):
        def act(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def stage_stopping(self, node: Node, how: str) -> None:
            answers.append(how)

    answers: list[str] = []
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what it would otherwise do here: end the tests
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(Pipeline(toy.pipeline()), store=tmp_path / "store", listener=Terminating(None))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert answers == ["stopping now; its checkpoints are kept"]
    assert not list((tmp_path / "store").glob("number/*.partial/log.txt"))


@pytest.mark.parametrize(("head_start", "limit", "waits"), [(0, 60, True), (60, 60, False), (0, 0, False)])
def test_imports_are_awaited_within_limits(
    head_start: float, limit: float, waits: bool, importing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.runner.stage_process.HEAD_START_SECONDS", head_start)
    monkeypatch.setattr("align.runner.stage_process.IMPORT_SECONDS", limit)
    stage = [*WORKER, "folder"], stage_environment(), None
    assert is_importing(*stage) == waits
    assert not is_importing([*WORKER, "folder"], stage_environment(), 1)  # it could not be forked from this server
    assert this_thread.server is not None
    this_thread.server.process.kill()
    this_thread.server.process.wait()
    assert not is_importing(*stage)


def test_the_environment_can_turn_forks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_thread, "server", None)
    monkeypatch.setenv(OFF, "0")
    with forked_stages(None):
        assert this_thread.server is None


@pytest.mark.parametrize("place", ["align.runner.stage_process.subprocess.Popen", "os.pidfd_open"])
def test_a_system_that_refuses_a_server_does_without(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(this_thread, "server", None)
    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        with forked_stages(None):
            assert this_thread.server is None
    assert ForkServer.is_possible()


def test_server_belongs_to_one_thread_of_one_process(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ForkServer | None] = []
    thread = threading.Thread(target=lambda: seen.append(this_thread.server))
    thread.start()
    thread.join()
    assert seen == [None]
    monkeypatch.setattr("align.runner.stage_process.os.getpid", lambda: server.owner + 1)
    assert not server.serves([*WORKER, "folder"], stage_environment(), None)


def test_silent_server_is_ended_and_stage_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.runner.fork_server.ANSWER_SECONDS", 0.2)
    server = start_server()
    monkeypatch.setattr(this_thread, "server", server)
    os.kill(server.process.pid, signal.SIGSTOP)
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    assert server.process.returncode == -signal.SIGKILL
    assert LIBRARY not in run.artifact("one").record["packages"]


def test_only_runs_with_two_loading_stages_have_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def refuse(threads: int | None, vllm: bool) -> None:
        raise Stop(threads, vllm)

    monkeypatch.setattr(runner, "forked_stages", refuse)
    run_pipeline(Pipeline(toy.pipeline()), store=tmp_path / "toy")
    smoke = Pipeline.load("pipelines/smoke.yaml").set("runtime.threads=3")
    with pytest.raises(Stop) as stopped:
        run_pipeline(smoke, store=tmp_path / "smoke")
    assert stopped.value.args == (3, False)

    nodes = {node.name: node for node in smoke}
    monkeypatch.setattr(runner, "forked_stages", lambda threads, vllm: "forked")
    assert runner._forked_stages(smoke, [nodes["model"], nodes["sft"]]) == "forked"
    assert runner._forked_stages(smoke, [nodes["sft"], nodes["data"]]) != "forked"


def test_a_process_that_ended_before_it_told_its_id_is_none() -> None:
    for told in (b"exit -9\n", b""):
        reader, writer = os.pipe()
        os.write(writer, told)
        os.close(writer)
        assert ForkedProcess.accept(reader) is None


def test_a_forked_process_is_waited_for_so_long() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"pid 12\n")
    process = ForkedProcess.accept(reader)
    assert process is not None and process.pid == 12
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    os.write(writer, b"exit -15\n")
    os.close(writer)
    assert process.wait() == -signal.SIGTERM


def test_a_server_ends_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("align.runner.worker.end_without_teardown", lambda: None)
    monkeypatch.setattr("align.runner.worker.set_threads", lambda threads: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(fork_server, "relax_collections", lambda: None)
    monkeypatch.setattr(fork_server, "die_with_parent", lambda parent: None)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.close()
    assert fork_server.preload(0, ["torch"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not fork_server.preload(0, ["torch"])
    assert fork_server.main(there.detach(), os.getpid(), 0, ["torch"]) == 0


def test_long_log_keeps_its_start_and_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(writer, b"first\n")
    for _ in range(20):
        os.write(writer, b"x" * 2**20)
    os.write(writer, b"\nlast\n")
    shorten_log(log)
    os.write(writer, b"later\n")
    os.close(writer)
    content = log.read_bytes()
    assert content.startswith(b"first\nxxx") and content.endswith(b"xxx\nlast\nlater\n")
    assert content.count(b"Output is left out here") == 1 and len(content) < 9 * 2**20
    shorten_log(log)
    assert log.read_bytes() == content


def test_output_of_a_stage_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.runner.stage_process.LOG_BYTES", 4000)
    monkeypatch.setattr("align.runner.stage_process.LOG_KEPT", 1000)
    run = run_pipeline(Pipeline(toy.pipeline(one={"crash": "noise"})), store=tmp_path, only="one")
    assert 2000 < (run.artifacts["one"].path / "log.txt").stat().st_size < 4000


def test_failed_reward_is_told_without_its_class(tmp_path: Path) -> None:
    text = "rewards 'own_judge' (rw.py:5): ReadError: no message, for row 12"
    assert worker._explain(ScoreFailed(text), tmp_path) == {"status": "failed", "message": text}


def test_failed_allocation_is_explained_as_memory(tmp_path: Path) -> None:
    """Under `ulimit -v` torch raises a RuntimeError, and the system kills nothing."""
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
    for error in (RuntimeError(text), RuntimeError("std::bad_alloc"), RuntimeError("could not create a primitive")):
        assert "micro_batch_size: auto" in worker._explain(error, tmp_path)["message"]
    assert "micro_batch_size" not in worker._explain(RuntimeError("shape mismatch"), tmp_path)["message"]
