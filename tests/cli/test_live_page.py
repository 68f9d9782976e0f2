"""The page of a run is there while the run goes on, and says what runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from align import Pipeline
from align.cli import live_page
from align.cli.live_page import RunState, read_states, write_pages
from align.cli.main import main
from align.cli.run_session import _ConsoleSession
from align.report.run import run_report
from align.runner.open_store import Opening
from align.store.artifacts import Artifact
from align.store.store import Store

Capture = pytest.CaptureFixture[str]
STAGES = "tests.support.cli.gated_stages:WAITING"


def page_of(store: Path) -> Path:
    return store / "reports" / "gates" / "report.html"


def boxes(page: Path) -> dict[str, str]:
    matches = re.findall(r'<g class="box (\w+)"><title>(\w+)</title>', page.read_text())
    return {name: status for status, name in matches}


def await_page(page: Path, has_content: Callable[[str], bool]) -> str:
    """Return the page's text once it has the content; fail after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if page.is_file() and has_content(page.read_text()):
            return page.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{page}: not there, or without the content")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """Return the file of a pipeline of two stages that wait for ``first`` and ``second`` beside it."""
    stages = {name: {"stage": STAGES, "file": str(tmp_path / name)} for name in ("first", "second")}
    path = tmp_path / "gates.yaml"
    path.write_text(yaml.safe_dump({"name": "gates", "stages": stages}, sort_keys=False))
    return path


def test_the_page_shows_each_stage_while_it_runs(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(live_page, "START_AFTER", 0.0)
    codes: list[int] = []
    run = threading.Thread(target=lambda: codes.append(main(["run", str(gates), "--store", str(store)])))
    run.start()
    try:
        text = await_page(page_of(store), lambda text: "Stage first is running" in text)
        assert 'data-refresh="30"' in text and "No evaluation is finished yet." in text
        assert boxes(page_of(store)) == {"first": "running", "second": "pending"}
        (gates.parent / "first").touch()
        text = await_page(page_of(store), lambda text: "Stage second is running" in text)
        assert boxes(page_of(store)) == {"first": "done", "second": "running"}
        assert "held-out loss" in text and "3.25" in text and "1.50" in text
    finally:
        (gates.parent / "first").touch()
        (gates.parent / "second").touch()
        run.join()
    assert codes == [0]
    assert "data-refresh" not in page_of(store).read_text(), "the final page reloads no more"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Page while it runs: {page_of(store).resolve()}"
    assert lines[-1] == f"Report: {page_of(store).resolve()}"


@pytest.mark.parametrize("is_writer_killed", [False, True])
def test_runner_writes_final_page_if_writer_is_gone(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, is_writer_killed: bool
) -> None:
    drawn: list[Path] = []
    draw = run_report.write_report

    def remember(artifacts: Sequence[Artifact], scorecard: None, out: Path, **options: Any) -> Path:
        drawn.append(out)
        return draw(artifacts, scorecard, out, **options)

    # In this process, which is the runner's.
    monkeypatch.setattr(run_report, "write_report", remember)
    monkeypatch.setattr(live_page, "START_AFTER", 0.0)
    (gates.parent / "first").touch()
    run = threading.Thread(target=main, args=(["run", str(gates), "--store", str(store)],))
    run.start()
    try:
        await_page(page_of(store), lambda text: "Stage second is running" in text)
        if is_writer_killed:
            # Other processes may end meanwhile, and other tests have writers of their own.
            for process in psutil.process_iter(["ppid", "cmdline"]):
                if process.info["ppid"] == os.getpid() and "align.cli.live_page" in (process.info["cmdline"] or ()):
                    process.kill()
    finally:
        (gates.parent / "second").touch()
        run.join()
    assert drawn == [page_of(store)] * is_writer_killed
    assert boxes(page_of(store)) == {"first": "done", "second": "done"}
    assert "data-refresh" not in page_of(store).read_text()
    assert capsys.readouterr().err == ""


def test_a_short_run_starts_no_writer(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    commands: list[str] = []
    start = subprocess.Popen

    def remember(command: list[str], *rest: object, **options: object) -> object:
        commands.append(" ".join(map(str, command)))
        return start(command, *rest, **options)

    monkeypatch.setattr(live_page, "START_AFTER", 600.0)
    monkeypatch.setattr(live_page.subprocess, "Popen", remember)
    for name in ("first", "second"):
        (gates.parent / name).touch()
    assert main(["run", str(gates), "--store", str(store)]) == 0
    assert page_of(store).is_file()
    assert not any("live_page" in command for command in commands)
    capsys.readouterr()
    # Nothing runs, so there is no page to announce beside the final one.
    assert main(["run", str(gates), "--store", str(store)]) == 0
    assert "Page while it runs" not in capsys.readouterr().out


def test_a_stage_that_runs_again_is_not_shown_as_done(gates: Path, store: Path) -> None:
    for name in ("first", "second"):
        (gates.parent / name).touch()
    assert main(["run", str(gates), "--store", str(store), "--json"]) == 0
    write_pages("gates", Store(store), iter([RunState(running=["first"])]))
    assert boxes(page_of(store)) == {"first": "running", "second": "pending"}
    write_pages("gates", Store(store), iter([RunState(cached=["first"], running=["second"])]))
    assert boxes(page_of(store)) == {"first": "cached", "second": "running"}


def test_writer_finishes_page_of_killed_runner(gates: Path, store: Path) -> None:
    for name in ("first", "second"):
        (gates.parent / name).touch()
    assert main(["run", str(gates), "--store", str(store), "--json"]) == 0
    opening = json.dumps(asdict(Opening.of(Store(store))))
    writer = subprocess.Popen(
        [sys.executable, "-m", "align.cli.live_page", opening, "gates"], stdin=subprocess.PIPE, text=True
    )
    assert writer.stdin is not None
    writer.stdin.write(json.dumps(asdict(RunState(done=["first"], running=["second"]))) + "\n")
    writer.stdin.flush()
    await_page(page_of(store), lambda text: "Stage second is running" in text)
    writer.stdin.close()
    assert writer.wait(60) == 0
    assert "data-refresh" not in page_of(store).read_text()


def test_a_page_that_cannot_be_written_is_tried_again(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (gates.parent / name).touch()
    assert main(["run", str(gates), "--store", str(store), "--json"]) == 0
    write, failures = live_page.write_page, [OSError(28, "No space left on device")]

    def write_or_fail(*arguments: object, **options: object) -> Path:
        if failures:
            raise failures.pop()
        return write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(live_page, "write_page", write_or_fail)
    write_pages("gates", Store(store), iter([RunState(running=["first"]), RunState(running=["first"])]))
    assert boxes(page_of(store)) == {"first": "running", "second": "pending"}


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_cannot_be_started_is_no_end_of_the_run(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, tried = subprocess.Popen, threading.Event()

    def refuse(command: list[str], *rest: object, **options: object) -> object:
        if "align.cli.live_page" not in command:
            return start(command, *rest, **options)  # type: ignore[call-overload]
        tried.set()
        (gates.parent / "second").touch()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(live_page, "START_AFTER", 0.0)
    monkeypatch.setattr(live_page.subprocess, "Popen", refuse)
    (gates.parent / "first").touch()
    assert main(["run", str(gates), "--store", str(store)]) == 0
    assert tried.is_set()


def test_a_failed_stage_runs_no_more_while_others_go_on(
    gates: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster, where several stages run at once."""
    sent: list[list[str]] = []
    monkeypatch.setattr(live_page, "START_AFTER", 600.0)
    monkeypatch.setattr(live_page.LivePage, "send", lambda page: sent.append(list(page.state.running)))
    pipeline = Pipeline.load(gates)
    session = _ConsoleSession(pipeline, None, store)
    try:
        for node in pipeline:
            session.stage_started(node, store, resumed=False)
        session.stage_failed(pipeline.nodes["first"], "a bug", store / "log.txt")
        assert session._page is not None and session._page.state.failed == ["first"]
    finally:
        session.close_page()
    assert sent == [["first"], ["first", "second"], ["second"], ["second"]]


def test_all_stages_that_run_and_fail_at_once_are_shown(tmp_path: Path, store: Path) -> None:
    """As on a cluster, while ``last`` waits."""
    names = ("first", "second", "third", "last")
    stages = {name: {"stage": STAGES, "file": str(tmp_path / name)} for name in names}
    path = tmp_path / "gates.yaml"
    path.write_text(yaml.safe_dump({"name": "gates", "stages": stages}, sort_keys=False))
    for name in names:
        (tmp_path / name).touch()
    assert main(["run", str(path), "--store", str(store), "--json"]) == 0
    write_pages("gates", Store(store), iter([RunState(running=["first", "second", "third"])]))
    assert boxes(page_of(store)) == dict.fromkeys(names[:3], "running") | {"last": "pending"}
    assert "Not run: last." in page_of(store).read_text()
    write_pages("gates", Store(store), iter([RunState(running=["second", "third"], failed=["first"])]))
    assert boxes(page_of(store)) == {"first": "failed", "second": "running", "third": "running", "last": "pending"}


def test_all_failed_stages_are_shown_once_nothing_runs_any_more(tmp_path: Path, store: Path) -> None:
    """As after a run on a cluster, whose first failure alone has its message on the page."""
    names = ("first", "second", "last")
    stage = "tests.support.cli.gated_stages:SWITCHED"
    stages = {name: {"stage": stage, "file": str(tmp_path / name)} for name in names}
    path = tmp_path / "gates.yaml"
    path.write_text(yaml.safe_dump({"name": "gates", "stages": stages}, sort_keys=False))
    for name in names[:2]:
        (tmp_path / name).touch()
        assert main(["run", str(path), "--store", str(store), "--only", name, "--json"]) == 1
    assert boxes(page_of(store)) == {"first": "failed", "second": "failed", "last": "pending"}
    (tmp_path / "second").unlink()
    assert main(["run", str(path), "--store", str(store), "--only", "second", "--json"]) == 0
    assert main(["report", "gates", "--store", str(store)]) == 0
    assert boxes(page_of(store)) == {"first": "failed", "second": "done", "last": "pending"}


def test_failed_stage_that_is_rerun_is_running() -> None:
    state = RunState(failed=["a"])
    state.move("a", state.running)
    assert state == RunState(running=["a"])


def test_newest_state_is_written_and_repeated() -> None:
    reader, writer = os.pipe()
    states = [RunState(running=["a"]), RunState(done=["a"], running=["b"])]
    os.write(writer, "".join(json.dumps(asdict(state)) + "\n" for state in states).encode())
    news = read_states(reader, every=0.05)
    assert next(news) == states[1]
    assert next(news) == states[1], "the running stage goes on, so its curves may have grown"
    os.write(writer, (json.dumps(asdict(RunState(has_ended=True))) + "\n").encode())
    assert next(news) == RunState(has_ended=True)
    assert list(news) == []


def test_a_state_between_two_stages_is_not_worth_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "SETTLE", 60.0)
    reader, writer = os.pipe()
    states = read_states(reader, every=60.0)

    def send(state: RunState) -> None:
        os.write(writer, (json.dumps(asdict(state)) + "\n").encode())

    send(RunState(running=["a"]))
    assert next(states) == RunState(running=["a"])
    send(RunState(done=["a"]))
    end = threading.Timer(0.3, send, (RunState(done=["a"], has_ended=True),))
    end.start()
    assert next(states) == RunState(done=["a"], has_ended=True)
    end.join()


def test_news_waits_after_slow_page_and_end_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "SHARE_OF_CHANGES", 0.25)
    reader, writer = os.pipe()

    def send(state: RunState) -> None:
        os.write(writer, (json.dumps(asdict(state)) + "\n").encode())

    news = read_states(reader, every=60.0)
    send(RunState(running=["a"]))
    next(news)
    started = time.monotonic()
    send(RunState(done=["a"]))
    send(RunState(done=["a"], running=["b"]))
    time.sleep(0.1)  # the page
    assert next(news) == RunState(done=["a"], running=["b"])
    assert time.monotonic() - started > 0.3
    time.sleep(0.1)
    send(RunState(done=["a"], running=["c"]))
    send(RunState(has_ended=True))
    started = time.monotonic()
    assert next(news) == RunState(has_ended=True)
    assert time.monotonic() - started < 0.2


def test_the_end_of_the_pipe_without_a_last_word_is_told() -> None:
    reader, writer = os.pipe()
    os.write(writer, (json.dumps(asdict(RunState(running=["a"]))) + "\n").encode())
    os.close(writer)
    assert list(read_states(reader, every=5.0)) == [RunState(running=["a"]), None]
