"""vLLM's server for users, for real: it answers as the checkpoint does, only with its key, and ends without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from align.errors import StageFailed, UserError
from align.inference.servers.openai_server import OpenAiServer, ServedModel
from align.models.loading import load_policy, load_tokenizer
from tests.support.models.adapters import write_trained

pytestmark = pytest.mark.slow
TALK = [{"role": "user", "content": "List three colors."}]
SECONDS = 480.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_trained(tiny_model, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def server(tiny_model: Path, trained: Path) -> Iterator[OpenAiServer]:
    pytest.importorskip("vllm")
    model = ServedModel(
        tiny_model, "tiny", {"tuned": trained / "adapter"}, 8, "float32", 512, is_on_cpu=True, cpu_cache_gb=0.25
    )
    with OpenAiServer(model) as running:
        lines: list[str] = []
        running.wait(SECONDS, lines.append)
        assert any("vLLM" in line for line in lines)
        yield running


def ask(server: OpenAiServer, model: str, **headers: str) -> httpx.Response:
    body = {"model": model, "messages": TALK, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    return httpx.post(f"{server.address}/chat/completions", json=body, headers=headers, timeout=120, trust_env=False)


def greedy(folder: Path) -> list[int]:
    """The first tokens of transformers' own answer, which ends nowhere in a random model."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = load_policy(folder).generate(**ids, max_new_tokens=12, do_sample=False)
    return [int(token) for token in out[0, ids["input_ids"].shape[1] :]]


def test_base_and_adapter_answer_by_their_names(server: OpenAiServer, tiny_model: Path, trained: Path) -> None:
    answers = []
    for name, folder in (("tiny", tiny_model), ("tuned", trained / "model")):
        reply = ask(server, name, Authorization=f"Bearer {server.key}")
        assert reply.status_code == 200, reply.text
        answers.append(reply.json()["choices"][0]["token_ids"])
        assert answers[-1] == greedy(folder)
    assert answers[0] != answers[1]


def test_request_without_key_or_of_browser_is_refused(server: OpenAiServer) -> None:
    assert ask(server, "tiny").status_code == 401
    key = f"Bearer {server.key}"
    assert ask(server, "tiny", Authorization=key, Origin="http://evil.example").status_code == 403
    assert ask(server, "tiny", Authorization=key, Host="evil.example").status_code == 403
    root = server.address.removesuffix("/v1")
    reply = httpx.post(f"{root}/collective_rpc", headers={"Authorization": key}, json={}, trust_env=False)
    assert reply.status_code == 404, "development routes are off"


def test_key_is_in_no_command_line(server: OpenAiServer) -> None:
    family = [psutil.Process(server.server.process.pid), *psutil.Process(server.server.process.pid).children(True)]
    words = [word for process in family for word in process.cmdline()]
    assert words and not any(server.key in word for word in words)
    assert not any(server.key in value for process in family for value in process.environ().values())


def test_port_in_use_is_refused(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            OpenAiServer(ServedModel(tiny_model, "tiny"), port)


def test_server_that_cannot_start_is_quoted(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = ServedModel(tiny_model, "tiny", options=("--no-such-option",), is_on_cpu=True)
    with OpenAiServer(model) as server, pytest.raises(StageFailed, match=r"before it answered\.(.|\n)*no-such-option"):
        server.wait(SECONDS, lambda line: None)
    assert not server.folder.exists()


@pytest.mark.timeout(2 * SECONDS)
def test_interrupt_ends_command_and_server(tiny_model: Path) -> None:
    pytest.importorskip("vllm")
    options = ["--max-length", "256", "--cache-gb", "0.25"]
    command = [sys.executable, "-m", "align.cli.main", "serve", str(tiny_model), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Serving model at http://127.0.0.1:")
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
