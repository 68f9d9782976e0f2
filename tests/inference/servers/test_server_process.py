"""Servers of our own, which end with us, and servers of others, which are checked first and left running."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.errors import UserError
from align.inference.protocol import Sampling
from align.inference.servers import server_process
from align.inference.servers.server import ServerEngine
from align.inference.servers.server_client import BadReply, EngineLost
from align.inference.servers.server_process import LocalServer, Placement
from align.pipeline.process_limits import SLEEPING, SPINNING
from tests.support.inference import fake_server
from tests.support.inference.fake_server import FakeServer
from tests.support.inference.server_harness import PROMPTS, open_at, soon, wait_for
from tests.support.processes import command_of

REPOSITORY = Path(__file__).resolve().parents[3]

# ---- a server that somebody else started ----


def test_no_server_at_the_address(tiny_model: Path) -> None:
    gone = FakeServer()
    gone.stop()
    with soon(), pytest.raises(UserError) as caught:
        open_at(tiny_model, gone.address)
    assert f"runtime.rollouts.addresses has {gone.address}, but no vLLM server" in str(caught.value)
    assert "ConnectionRefusedError" in str(caught.value)
    assert "Start it with: ALIGN_SERVER_KEY_FILE=server.key VLLM_SERVER_DEV_MODE=1 python -m vllm." in str(caught.value)
    assert "--middleware align.inference.server_guard.Guard" in str(caught.value)


def test_a_server_without_development_mode(fake: FakeServer, tiny_model: Path) -> None:
    del fake.answers["/server_info"]
    with pytest.raises(UserError, match="no vLLM server in development mode answers there: .* status 404"):
        open_at(tiny_model, fake.address)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "torch.bfloat16"}, "dtype bfloat16 instead of float32"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs-mode raw_logprobs instead of processed_logprobs"),
        ({"generation_config": "auto"}, "generation-config auto instead of vllm"),
        ({"max_model_len": 63}, "max-model-len 63 instead of 64 or more"),
    ],
)
def test_an_unfit_server(fake: FakeServer, tiny_model: Path, changed: dict[str, Any], message: str) -> None:
    fake.answers["/server_info"] = lambda body: fake_server.info(**changed)
    with pytest.raises(UserError, match=re.escape(message)):
        open_at(tiny_model, fake.address)
    assert fake.paths() == ["/server_info"]


def test_a_server_that_answers_without_a_key_is_refused(fake: FakeServer, tiny_model: Path) -> None:
    fake.guard.refusal = lambda headers: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match="needs no key .*anybody can change its weights.*"):
        open_at(tiny_model, fake.address)
    assert fake.paths() == ["/server_info"]


def test_a_wrong_key_and_none_are_said_and_not_repeated(
    fake: FakeServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOTHER_KEY", "the-key-of-another-server")
    with pytest.raises(UserError, match="refuses the key in ANOTHER_KEY .*key_variable.*status 401") as caught:
        open_at(tiny_model, fake.address, key_variable="ANOTHER_KEY")
    assert "the-key-of-another-server" not in str(caught.value)
    monkeypatch.setenv("ANOTHER_KEY", "short")
    with pytest.raises(UserError, match="what ANOTHER_KEY holds is no key of a server: it has fewer"):
        open_at(tiny_model, fake.address, key_variable="ANOTHER_KEY")
    monkeypatch.delenv("ANOTHER_KEY")
    with pytest.raises(UserError, match="the environment variable ANOTHER_KEY .* does not hold their key"):
        open_at(tiny_model, fake.address, key_variable="ANOTHER_KEY")
    assert fake.paths() == []


def test_a_server_without_our_worker_is_refused(fake: FakeServer, tiny_model: Path) -> None:
    info = fake_server.info()
    info["vllm_config"]["parallel_config"]["worker_extension_cls"] = ""
    fake.answers["/server_info"] = lambda body: info
    with pytest.raises(UserError, match="worker-extension-cls nothing instead of align"):
        open_at(tiny_model, fake.address)


def test_chunked_prefill_is_refused_on_a_cpu_only(fake: FakeServer, tiny_model: Path) -> None:
    info = fake_server.info()
    info["vllm_config"]["scheduler_config"]["enable_chunked_prefill"] = True
    fake.answers["/server_info"] = lambda body: info
    with pytest.raises(UserError, match="chunked prefill"):
        open_at(tiny_model, fake.address)
    info["vllm_config"]["device_config"]["device"] = "cuda"
    open_at(tiny_model, fake.address).close()
    del info["vllm_config"]["model_config"]["logprobs_mode"]
    with pytest.raises(BadReply, match=r"it lacks model_config\.logprobs_mode"):
        open_at(tiny_model, fake.address)


def test_it_is_given_the_weights_first_and_goes_on_afterwards(fake: FakeServer, tiny_model: Path) -> None:
    engine = open_at(tiny_model, fake.address)
    assert fake.paths() == ["/server_info", "/collective_rpc", "/reset_prefix_cache"]
    engine.close()
    assert not engine.folder.path.exists()
    assert engine.client.health() == "answers"


# ---- a server of our own ----


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the fake in place of vLLM."""
    monkeypatch.setattr(server_process, "MODULE", "tests.support.inference.fake_server")
    monkeypatch.chdir(REPOSITORY)


def _group(leader: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if server_process._in_group(process, leader)]


def _local(engine: ServerEngine) -> LocalServer:
    assert engine.client.server is not None
    return engine.client.server


@pytest.mark.usefixtures("stand_in")
def test_it_is_started_and_ended(tiny_model: Path) -> None:
    engine = open_at(tiny_model, None, timeout=120)
    assert engine.client.address.startswith("unix:/")
    assert len(engine.generate(PROMPTS, Sampling(4))) == len(PROMPTS)
    leader, log = _local(engine).process.pid, _local(engine).log
    assert len(_group(leader)) == 2
    engine.close()
    engine.close()
    assert _group(leader) == []
    assert not log.exists()


@pytest.mark.usefixtures("stand_in")
def test_no_other_user_can_reach_it_and_its_key_is_shown_nowhere(tiny_model: Path) -> None:
    engine = open_at(tiny_model, None, timeout=120)
    socket = Path(engine.client.address.removeprefix("unix:"))
    key_file = socket.with_name("server.key")
    key = key_file.read_text().strip()
    assert len(key) == 64
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    for process in _group(_local(engine).process.pid):
        assert key not in command_of(process)
        assert key not in json.dumps(process.environ())
        assert [
            connection for connection in process.net_connections("inet") if connection.status == psutil.CONN_LISTEN
        ] == []
    assert key not in _local(engine).log.read_text()
    assert engine.client.exchange("GET", "/server_info", None, 5, with_key=False).status == 401
    engine.close()
    assert not key_file.exists()
    assert key not in repr(vars(engine.spec))


@pytest.mark.usefixtures("stand_in")
def test_a_long_path_of_temporary_files(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's path has 107 bytes at most."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    engine = open_at(tiny_model, None, timeout=120)
    closed = Path(engine.client.address.removeprefix("unix:")).parent
    assert closed.parent == Path("/tmp") and closed.stat().st_mode & 0o777 == 0o700
    assert len(engine.generate(PROMPTS, Sampling(4))) == len(PROMPTS)
    engine.close()
    assert not closed.exists()


@pytest.mark.usefixtures("stand_in")
def test_it_is_killed_during_a_call(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "hang")
    engine = open_at(tiny_model, None, timeout=120)
    with soon(), pytest.raises(EngineLost, match=r"within 0\.5 s .*Its process \(pid \d+\) is alive; /health answers"):
        engine.client.timeout = 0.5
        engine.generate(PROMPTS, Sampling(4))
    engine.client.timeout = 20
    victim = psutil.Process(_local(engine).process.pid).children()[0]
    threading.Timer(0.5, victim.kill).start()
    with soon(), pytest.raises(EngineLost) as caught:
        engine.generate(PROMPTS, Sampling(4))
    assert "Its process was ended by SIGKILL; /health does not answer" in str(caught.value)
    engine.close()


@pytest.mark.usefixtures("stand_in")
def test_its_death_is_seen_though_its_connections_live(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that inherited them keeps them open: nothing but the process itself tells."""
    monkeypatch.setenv("FAKE_SERVER", "cling")
    monkeypatch.setattr(server_process, "GRACE_SECONDS", 0.3)
    engine = open_at(tiny_model, None, timeout=120)
    leader = _local(engine).process.pid
    victim = psutil.Process(leader).children()[0]

    def kill_once_all_are_held() -> None:
        # The engine has ``batch_size`` requests in flight, and each leaves a child. A connection that no child has
        # inherited yet would end with the server.
        wait_for(lambda: len(victim.children()) == engine.batch_size)
        victim.kill()

    threading.Thread(target=kill_once_all_are_held).start()
    with soon(), pytest.raises(EngineLost, match="its process ended, after .* Its process was ended by SIGKILL"):
        engine.generate(PROMPTS, Sampling(4))
    engine.close()
    wait_for(lambda: _group(leader) == [])


@pytest.mark.usefixtures("stand_in")
def test_it_does_not_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "refuse")
    with soon(60), pytest.raises(EngineLost) as caught:
        open_at(tiny_model, None, timeout=90)
    assert re.search(r"was not ready after \d+ s of at most 90 \(runtime.engine.timeout\)", str(caught.value))
    assert "Its process ended with exit code 1" in str(caught.value)
    assert "The end of its log:\nno room for the cache" in str(caught.value)
    monkeypatch.setenv("FAKE_SERVER", "mute")
    monkeypatch.setattr(server_process, "GRACE_SECONDS", 0.3)
    with (
        soon(),
        pytest.raises(EngineLost, match=r"not ready after \d s of at most 1 \(.*is alive; /health does not") as caught,
    ):
        open_at(tiny_model, None, timeout=1)
    leader = int(re.findall(r"pid (\d+)", str(caught.value))[0])
    wait_for(lambda: _group(leader) == [])


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


def test_a_stubborn_group_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "GRACE_SECONDS", 0.3)
    local = LocalServer([sys.executable, "-c", STUBBORN], [tmp_path])
    wait_for(lambda: "ready" in local.log_tail() and len(_group(local.process.pid)) == 3)
    with soon():
        local.end()
    wait_for(lambda: _group(local.process.pid) == [])


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed, so nothing of its own runs any more: the guard ends the group and removes the folders."""
    folders = [tmp_path / "log", tmp_path / "weights"]
    program = (
        "import sys, time; from pathlib import Path; from align.inference.servers import server_process as server\n"
        "server.GRACE_SECONDS = 0.3\n"
        f"folders = [Path(folder) for folder in {[str(folder) for folder in folders]!r}]\n"
        "for folder in folders: folder.mkdir()\n"
        f"one = server.LocalServer([sys.executable, '-c', {STUBBORN!r}], folders)\n"
        "while 'ready' not in one.log_tail(): time.sleep(0.05)\n"
        "print(one.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    leader = int(parent.stdout.readline())
    assert len(_group(leader)) == 3
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: _group(leader) == [])
    assert list(tmp_path.iterdir()) == []


def test_server_threads_sleep_if_the_stage_spins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SPINNING.items():
        monkeypatch.setenv(name, value)
    assert SLEEPING.items() <= server_process._environment(tmp_path, Placement(), None).items()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's own
    assert server_process._environment(tmp_path, Placement(), None)["GOMP_SPINCOUNT"] == "7"
