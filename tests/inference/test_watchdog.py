"""Calls to engines in this process are bounded: a stage ends and can be resumed, any other process is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align import Pipeline
from align.config.runtime import EngineConfig, Runtime
from align.errors import StageFailed
from align.inference import transformers as module
from align.inference.engine import open_engine
from align.inference.protocol import Sampling, Watchdog
from align.inference.transformers import TransformersEngine
from align.inference.weights import checkpoint_weights
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.store.store import Store

# ---- in a stage's own process ----


def _raw(how: str) -> dict[str, Any]:
    return {"name": "hang", "stages": {"one": {"stage": "tests.support.inference.hanging_engine:HANG", "how": how}}}


def _failed(raw: dict[str, Any], store: Path) -> tuple[str, str]:
    """What is said of the run, and its log; it can be resumed."""
    began = time.monotonic()
    with pytest.raises(StageFailed) as caught:
        run_pipeline(Pipeline(raw), store=store)
    assert time.monotonic() - began < 20  # the call itself takes twenty minutes
    output, _, path = str(caught.value).rpartition("\nLog: ")
    log = Path(path).read_text()
    assert [step.action for step in plan(Pipeline(raw), Store.open(store))] == ["resume"]
    assert run_pipeline(Pipeline(raw), store=store).ran == ["one"]
    return output, log


def test_a_stage_whose_engine_hangs_is_ended_with_the_reason(tmp_path: Path) -> None:
    output, log = _failed(_raw("sleeps"), tmp_path)
    assert output.startswith(
        "stage 'one' failed: the toy engine made no progress in 'generate' for 1 s (runtime.engine."
    )
    assert "run again to resume the stage" in output
    assert "raise runtime.engine.timeout" in output
    assert "in native_sleep" in log  # where it hung


def test_a_hang_that_locks_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    """No thread of Python can say anything then; the stacks say it."""
    output, log = _failed(_raw("locks"), tmp_path)
    assert "its process ended with exit code 1" in output
    assert "Timeout (0:00:02)!" in log
    assert "in sleep_with_the_interpreter_locked" in log


def test_a_process_that_stood_still_is_not_ended(tmp_path: Path) -> None:
    assert run_pipeline(Pipeline(_raw("stops")), store=tmp_path).ran == ["one"]


# ---- in any other process ----


@pytest.fixture
def read_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What standard error was told since the last question."""
    yield lambda: capfd.readouterr().err


def test_progress_starts_the_clock_anew(read_stderr: Callable[[], str]) -> None:
    dog = Watchdog("toy", 1.0)
    with dog.watch("generate"):
        for _ in range(20):
            time.sleep(0.1)
            dog.progress()
    assert read_stderr() == ""
    with dog.watch("generate"):
        time.sleep(1.6)
    stderr = read_stderr()
    assert stderr.count("the toy engine made no progress in 'generate' for 1 s") == 1
    assert "Nothing was ended" in stderr
    assert "in test_progress_starts_the_clock_anew" in stderr


def test_a_call_that_fails_is_watched_no_longer(read_stderr: Callable[[], str]) -> None:
    with pytest.raises(ValueError), Watchdog("toy", 0.4).watch("generate"):
        raise ValueError
    time.sleep(0.8)
    assert read_stderr() == ""


class Slow:
    """The engine's model, which takes its time over every call."""

    def __init__(self, model: Any, seconds: float) -> None:
        self.model, self.seconds = model, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        time.sleep(self.seconds)
        return self.model(**inputs)


def _engine(model_dir: Path, timeout: float) -> TransformersEngine:
    watchdog = Watchdog("transformers", timeout)
    return TransformersEngine(
        model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=4, watchdog=watchdog
    )


def _late(weights: Any, seconds: float) -> Any:
    for pair in weights:
        time.sleep(seconds)
        yield pair


CALLS: dict[str, Callable[[TransformersEngine, Path, float], Any]] = {
    "generate": lambda engine, _, seconds: engine.generate([[1, 30, 31]], Sampling(12)),
    "score_tokens": lambda engine, _, seconds: engine.score_tokens([[1, 30]] * 12, [[31]] * 12, 1.0),
    "load_weights": lambda engine, folder, seconds: engine.load_weights(_late(checkpoint_weights(folder), seconds)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_watched_and_knows_its_progress(
    tiny_model: Path, read_stderr: Callable[[], str], call: str
) -> None:
    engine = _engine(tiny_model, 1.0)
    engine.eos = -1
    engine.model = Slow(engine.model, 0.12)  # of which twelve are longer than the timeout
    read_stderr()
    began = time.monotonic()
    CALLS[call](engine, tiny_model, 0.12)
    assert time.monotonic() - began > 1.3
    assert read_stderr() == ""
    engine.watchdog.timeout = 0.05
    CALLS[call](engine, tiny_model, 0.2)
    assert f"the transformers engine made no progress in '{call}'" in read_stderr()


def test_its_start_is_watched(
    tiny_model: Path, read_stderr: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda *inputs: time.sleep(0.8) or load(*inputs))
    _engine(tiny_model, 0.3)
    assert "the transformers engine made no progress in 'start'" in read_stderr()


def test_open_engine_hands_the_timeout_and_the_end_on(tiny_model: Path) -> None:
    runtime = Runtime(engine=EngineConfig(name="transformers", timeout=77))
    opened = open_engine(
        tiny_model, runtime, precision="float32", max_length=64, seed=0, warn=print, on_hang=(end := [].append)
    )
    assert isinstance(opened, TransformersEngine)
    assert (opened.watchdog.timeout, opened.watchdog.on_hang) == (77, end)
