"""Stage synthesize killed on its way: the same bytes, and nothing answered is asked again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.extensions.synthesis.run import synthesize
from align.inference import endpoint_client
from align.inference.requests import RequestCache
from align.pipeline.context import StageContext
from tests.support.inference.fake_chat import FakeChat
from tests.support.stages.synthesis_harness import (
    digests,
    endpoint_of,
    lay_out,
    make_context,
    talk,
    write_seeds,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat(talk)
    yield server
    server.stop()


CONFIGS: dict[str, dict[str, Any]] = {
    "instructions": {"task": {"type": "instructions", "count": 60, "at_once": 3}},
    "responses": {"task": {"type": "responses", "n": 8}, "prompts": "prompts"},
    "best_of": {
        "task": {"type": "best_of", "n": 8}, "prompts": "prompts",
        "score": "tests.support.stages.synthesis_harness:word_score"
    },
    "pairs": {"task": {"type": "pairs", "n": 4}, "prompts": "prompts"},
}  # fmt: skip


def _context(folder: Path, fake: FakeChat, kind: str, tmp_path: Path) -> StageContext:
    config = dict(CONFIGS[kind]) | {"endpoint": endpoint_of(fake, concurrency=3)}
    if kind == "instructions":
        config["seeds"] = write_seeds(tmp_path)
    if kind == "pairs":
        config["judge"] = {"endpoint": endpoint_of(fake, model="judge-model", concurrency=3)}
    return make_context(folder, **config)


def _process(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "align.runner.worker", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("pairs", 2), *(pytest.param(kind, 10**6, marks=pytest.mark.slow) for kind in CONFIGS)],
)
def test_repeated_kills_give_the_same_bytes(fake: FakeChat, tmp_path: Path, kind: str, most: int) -> None:
    uninterrupted = _context(tmp_path / "whole", fake, kind, tmp_path)
    synthesize(uninterrupted)
    requests = len(fake.bodies)
    fake.bodies.clear()
    fake.delay = 0.01
    killed = lay_out(_context(tmp_path / "killed", fake, kind, tmp_path))
    rng, kills, answered = random.Random(kind), 0, 0
    while True:
        before = len(fake.bodies)
        process = _process(killed)
        aim = before + rng.randint(1, max(2, requests // 4))
        while process.poll() is None and (len(fake.bodies) < aim or kills == most):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        while fake.under_way:  # the server still answers those who have gone
            time.sleep(0.005)
        cache = RequestCache(killed / "checkpoints")
        assert len(cache) >= answered, "what was answered is still there"
        answered = len(cache)
        cache.close()
    assert process.returncode == 0, process.stderr and process.stderr.read()
    assert kills >= 2
    # only what was under way at a kill, three requests at most, may be asked once more
    keys = [json.dumps(body, sort_keys=True) for body in fake.bodies]
    assert len(set(keys)) == requests and len(keys) - requests <= 3 * kills
    assert digests(killed / "output") == digests(uninterrupted.output)


def test_a_killed_checkpoint_run_comes_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.extensions.synthesis import local_model
    from align.inference.transformers import TransformersEngine

    monkeypatch.setattr(local_model, "SYNTHESIS_CHUNK", 4)
    config: dict[str, Any] = {
        "task": {"type": "responses", "n": 3},
        "model": "sft",
        "prompts": "data",
        "max_tokens": 48,
    }
    uninterrupted = make_context(tmp_path / "whole", tiny_model, **config)
    synthesize(uninterrupted)
    killed = make_context(tmp_path / "killed", tiny_model, **config)
    real, calls = TransformersEngine.generate, []

    def dies_third(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(TransformersEngine, "generate", dies_third)
    with pytest.raises(KeyboardInterrupt):
        synthesize(killed)
    with (killed.checkpoints / "answers-1.jsonl").open("ab") as file:  # the third chunk, half written
        file.write(b'{"answers": [{"answer": {"completion_tok')
    synthesize(killed)
    assert calls == [4, 4, 4, 4, 4, 4, 4, 3], "27 answers in chunks of 4, the third twice"
    assert digests(killed.output) == digests(uninterrupted.output)


@pytest.mark.slow
def test_vllm_killed_between_its_chunks_comes_to_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    config: dict[str, Any] = {
        "task": {"type": "responses", "n": 8}, "model": "sft", "prompts": "data", "max_tokens": 128, "train": 120,
    }  # fmt: skip

    def answered(folder: Path) -> int:
        return sum(path.read_bytes().count(b"\n") for path in (folder / "checkpoints").glob("answers-*.jsonl"))

    uninterrupted, killed = (
        lay_out(make_context(tmp_path / name, tiny_model, **config), "vllm") for name in ("whole", "killed")
    )
    process = _process(uninterrupted)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert answered(uninterrupted) == 8, "984 answers in chunks of 128"
    for chunks in (1, 4):
        process = _process(killed)
        while process.poll() is None and answered(killed) < chunks:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert chunks <= answered(killed) < 8
    process = _process(killed)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert answered(killed) == 8
    assert digests(killed / "output") == digests(uninterrupted / "output")
