"""A real vLLM server as judge, over HTTP: one that babbles, and one that is held to the form of a verdict."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from align.errors import UserError
from align.inference.requests import RequestCache
from align.inference.servers.server_process import MODULE, LocalServer, free_port
from tests.support.evaluation.judged_harness import FolderContext, answers_of, constant, make_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

LONGEST_START = 480
"""Seconds; half a minute where nothing else wants the cores."""


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The two-layer model behind vLLM's OpenAI-compatible server."""
    port = free_port()
    command = [
        sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", str(port), "--model", str(tiny_model),
        "--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8",
        "--max-model-len", "2048",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        server = LocalServer(command, [tmp_path_factory.mktemp("server")])
    try:
        deadline = time.monotonic() + LONGEST_START
        while not _answers(port):
            assert server.process.poll() is None and time.monotonic() < deadline, server.log_tail(30)
            time.sleep(0.2)
        yield {"url": f"http://127.0.0.1:{port}/v1", "model": "tiny", "retries": 1, "timeout": 120}
    finally:
        server.end()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_judge_that_babbles_is_an_error_with_counts(judge: dict[str, Any], tmp_path: Path) -> None:
    task = make_task(tmp_path, 20, judge={"endpoint": judge, "max_tokens": 16})
    bench = FolderContext(tmp_path)
    with pytest.raises(UserError, match=r"the judge tiny at .* in 16 of 16 judgments .*\(40 wanted") as caught:
        task.score(answers_of(task, constant("sft", "Yes."), constant("ppo", "No.")), bench)
    assert "cut off at judge.max_tokens" in str(caught.value)
    assert len(RequestCache(tmp_path / "judgments")) == 16
    assert bench.warnings == []


def test_a_judge_that_is_held_to_the_form_judges(judge: dict[str, Any], tmp_path: Path) -> None:
    form = {"structured_outputs": {"choice": ["[[A]]", "[[B]]", "[[C]]"]}}
    task = make_task(tmp_path, 12, judge={"endpoint": {**judge, "extra": form}, "max_tokens": 16})
    texts = [f"Answer {number}: {'x' * number}" for number in range(12)]
    (measured,) = task.score(
        answers_of(task, constant("sft", "Yes."), constant("ppo", *texts)), FolderContext(tmp_path)
    ).values()
    (row,) = task.extras()["win_rates"]
    message = measured.notes["verdicts"]
    assert row["n"] == 12 and message["unreadable"] == 0
    assert message["first"] + message["second"] + message["tie"] == 24
    assert row["wins"] + row["losses"] + row["ties"] + row["disagreements"] == 12
    assert task.usage["requests"] == 24 and task.usage["completion_tokens"] > 0
