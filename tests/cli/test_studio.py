"""``align studio``: the address that it prints, the addresses that it refuses, and its end."""

from __future__ import annotations

import importlib.util
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from align.cli.main import main
from align.cli.studio import listen
from tests.support.studio.server import running_studio


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["studio", *words]) == 2
    return capsys.readouterr().err


def test_chat_key_that_is_not_set_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    text = refusal(capsys, "--chat-key", "NO_KEY", "--store", str(tmp_path / "store"))
    assert "--chat-key NO_KEY: this environment variable is not set" in text


def test_other_hosts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        text = refusal(capsys, "--host", host, "--store", str(tmp_path / "store"))
        assert f"--host {host}: the studio only listens on this machine" in text
        assert "ssh -L" in text
    assert not (tmp_path / "store").exists()


def test_a_busy_port_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = refusal(capsys, "--port", str(port), "--store", str(tmp_path / "store"))
    assert f"--port {port}: another program uses this port" in text
    text = refusal(capsys, "--port", "70000", "--store", str(tmp_path / "store"))
    assert "a port is a number from 0 to 65535" in text


def test_next_port_is_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr("align.cli.studio.PORT", port)
        with listen("127.0.0.1", None) as listener:
            assert port < listener.getsockname()[1] < port + 10


def test_missing_package_has_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "sse_starlette" else find_spec(name, *more)
    )
    text = refusal(capsys, "--store", str(tmp_path / "store"))
    assert "align studio needs the package sse_starlette" in text
    assert "pip install 'align-pipeline[studio]'" in text


def test_ctrl_c_ends_a_studio_with_open_streams(tmp_path: Path) -> None:
    with running_studio(tmp_path / "store", "--read-only") as studio:
        assert studio.origin.startswith("http://127.0.0.1:")
        events: list[str] = []

        def follow() -> None:
            with studio.client() as client, client.stream("GET", "/api/runs-stream") as answer:
                try:
                    events.extend(answer.iter_lines())
                except httpx.HTTPError:
                    events.append("ended")

        reader = threading.Thread(target=follow)
        reader.start()
        deadline = time.monotonic() + 60
        while not events:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert events[0] == "event: state"
        studio.process.send_signal(signal.SIGINT)
        assert studio.process.wait(30) == 0
        reader.join(30)
        assert not reader.is_alive()
