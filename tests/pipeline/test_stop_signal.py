"""A run that is asked to stop: what is under way is kept, and the same run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import REQUEST, Stopped, StopRequest, is_stop_requested
from align.runner.listener import Listener
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.runner.stage_result import RESULT
from align.store.store import Store
from tests.support import toy
from tests.support.refusals import Refused


class At(Listener):
    """Calls ``act`` at a stage's event with ``done``."""

    def __init__(self, stage: str, done: int, act: Any) -> None:
        self.stage, self.done, self.act, self.finished = stage, done, act, []

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        if node.name == self.stage and event.get("done") == self.done:
            self.act()

    def stage_done(self, node: Node, artifact: Any) -> None:
        self.finished.append(node.name)


def test_a_stage_that_looks_for_it_stops_at_its_next_checkpoint(refused: Refused, tmp_path: Path) -> None:
    pipeline = Pipeline(toy.pipeline(one={"steps": 200, "pause": 0.05, "stops": True}))
    stop = StopRequest()
    refused(lambda: run_pipeline(pipeline, store=tmp_path / "store", listener=At("one", 2, stop.request), stop=stop))
    (partial,) = (tmp_path / "store").glob("number/*.partial")
    count = len(list((partial / "checkpoints").glob("step-*")))
    assert 2 <= count < 200
    assert next(iter(plan(pipeline, Store.open(tmp_path / "store")))).action == "resume"
    later = StopRequest()
    again = At("one", count + 2, later.request)
    with pytest.raises(Stopped):  # the request of before is forgotten, or it would have stopped one step later
        run_pipeline(pipeline, store=tmp_path / "store", listener=again, stop=later)
    assert len(list((partial / "checkpoints").glob("step-*"))) >= count + 2


def test_run_stops_after_stage_without_training_loop(refused: Refused, tmp_path: Path) -> None:
    stop = StopRequest()
    listener = At("one", 1, stop.request)
    refused(lambda: run_pipeline(Pipeline(toy.pipeline()), store=tmp_path, listener=listener, stop=stop))
    assert listener.finished == ["one"]
    assert run_pipeline(Pipeline(toy.pipeline()), store=tmp_path).ran == ["two", "total"]


def test_patience_ends_a_stage_that_does_not_stop(refused: Refused, tmp_path: Path) -> None:
    stop = StopRequest(patience=0.2)
    pipeline = Pipeline(toy.pipeline(one={"steps": 2000, "pause": 0.05}))
    refused(lambda: run_pipeline(pipeline, store=tmp_path, listener=At("one", 1, stop.request), stop=stop))
    assert next(iter(plan(pipeline, Store.open(tmp_path)))).action == "resume"


def test_asking_twice_ends_the_patience() -> None:
    stop = StopRequest()
    assert not stop.is_over
    stop.request()
    assert stop.is_requested and not stop.is_over
    stop.request()
    assert stop.is_over


def test_signals_are_handled_only_in_main_thread() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest().handle_signals(signal.SIGUSR1) as stop:
        assert stop.signals == {signal.SIGUSR1}
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_requested
    assert signal.getsignal(signal.SIGUSR1) == before and not stop.signals
    messages: list[frozenset[int]] = []

    def elsewhere() -> None:
        with StopRequest().handle_signals(signal.SIGUSR1) as thread_request:
            messages.append(thread_request.signals)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert messages == [frozenset()]


class CtrlC(Listener):
    """Presses Ctrl-C at the first event called ``event``, and ``again`` when the run has told how it stops."""

    def __init__(self, event: str, again: bool = False) -> None:
        self.event, self.again = event, again
        self.is_pressed = False
        self.answers: list[str] = []

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        if event["event"] == self.event and not self.is_pressed:
            self.is_pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    def stage_stopping(self, node: Node, how: str) -> None:
        self.answers.append(f"{node.name}: {how}")
        if self.again and len(self.answers) == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


AFTER_STEP = "one: stopping after the current step; press Ctrl-C again to stop now"
NOW = "one: stopping now; its checkpoints are kept"


@pytest.mark.usefixtures("default_ctrl_c")
@pytest.mark.parametrize(
    ("stops", "event", "again", "answers"),
    [
        (True, "metrics", False, [AFTER_STEP]),
        (True, "metrics", True, [AFTER_STEP, NOW]),
        (False, "metrics", False, [NOW]),
    ],
)
def test_ctrl_c_is_acknowledged_before_the_stage_ends(
    stops: bool, event: str, again: bool, answers: list[str], tmp_path: Path
) -> None:
    pipeline = Pipeline(toy.pipeline(one={"steps": 2000, "pause": 0.05, "stops": stops}))
    listener = CtrlC(event, again)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline, store=tmp_path, listener=listener, stop=StopRequest(ctrl_c=True))
    assert listener.answers == answers
    (partial,) = tmp_path.glob("number/*.partial")
    assert is_stop_requested(partial) == stops
    assert (partial / RESULT).is_file() == (stops and not again)  # a stage that stops by itself leaves a result
    assert next(iter(plan(pipeline, Store.open(tmp_path)))).action == "resume"


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_of_a_script_interrupts_at_once(tmp_path: Path) -> None:
    pipeline = Pipeline(toy.pipeline(one={"steps": 2000, "pause": 0.05, "stops": True}))
    listener = CtrlC("metrics")
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline, store=tmp_path, listener=listener)
    assert listener.answers == [NOW]


def started(command: list[str], cwd: Path, store: Path, folder: str) -> subprocess.Popen[str]:
    """The command, once a stage has left its second checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", *command, "--store", str(store)],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(store.glob(f"{folder}/*.partial/checkpoints/step-*"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_usr1_stops_the_command_which_continues_later(tmp_path: Path) -> None:
    raw = toy.pipeline(one={"steps": 60, "pause": 0.1, "stops": True})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    process = started(["run", "toy.yaml"], tmp_path, tmp_path / "store", "number")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stage 'one' stopped as asked, at step" in output and "Traceback" not in output
    assert "The same command continues" in output
    assert "Report: " in output
    (partial,) = (tmp_path / "store").glob("number/*.partial")
    assert is_stop_requested(partial) and (partial / REQUEST).exists()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_to_the_command_is_answered(options: list[str], tmp_path: Path) -> None:
    raw = toy.pipeline(one={"steps": 600, "pause": 0.1, "stops": True})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    process = started(["run", "toy.yaml", *options], tmp_path, tmp_path / "store", "number")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopping after the current step; press Ctrl-C again to stop now" in output and "Traceback" not in output
    assert "Stopped; finished stages and checkpoints are kept. The same command continues." in output


@pytest.mark.slow
def test_usr1_to_a_sweep_reaches_its_workers(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(
        yaml.safe_dump(toy.pipeline(one={"steps": 100, "pause": 0.1, "stops": True}, two={"steps": 1}), sort_keys=False)
    )
    sweep = {"name": "s", "pipeline": "toy.yaml", "space": {"stages.two.number": [1, 2]}, "maximize": "total.total"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    process = started(["sweep", "sweep.yaml", "--workers", "2"], tmp_path, tmp_path / "store", "number")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "stopped as asked; finished trials and stages are kept" in output and "Traceback" not in output
