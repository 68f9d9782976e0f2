"""Progress in a notebook: one display, updated in place; lines in a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import StageFailed
from align.runner.listener import ConsoleListener, Listener
from align.runner.notebook_listener import NotebookListener, is_in_notebook, progress_listener
from tests.support import ipython, toy
from tests.support.refusals import Refused


@pytest.fixture
def displays(monkeypatch: pytest.MonkeyPatch) -> ipython.Displays:
    return ipython.install(monkeypatch)


def test_notebook_has_one_display_with_a_line_per_stage(
    tmp_path: Path, displays: ipython.Displays, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(toy.pipeline())
    pipeline.run(store=tmp_path, progress=True)
    (contents,) = displays.contents
    lines = contents[-1]["text/plain"].splitlines()
    assert [line.split()[:2] for line in lines] == [["✓", "one"], ["✓", "two"], ["✓", "total"]]
    assert contents[-1]["text/html"].count("✓") == 3
    assert capsys.readouterr().out == ""
    pipeline.run(store=tmp_path, progress=True)
    assert displays.contents[1][-1]["text/plain"].count("cached") == 3


def test_a_running_stage_has_a_bar_with_what_is_done() -> None:
    displays = ipython.Displays()
    node = Pipeline(toy.pipeline()).nodes["one"]
    with NotebookListener([node], displays.display) as listener:
        listener.stage_started(node, Path(), resumed=False)
        listener.stage_event(node, {"event": "progress", "time": 1.0, "done": 2, "total": 3, "unit": "steps"})
        listener.show()
        shown = displays.contents[0][-1]
        listener.stage_failed(node, "no", Path("log.txt"))
    assert "2/3 steps" in shown["text/plain"] and "━" in shown["text/html"]
    final = displays.contents[0][-1]["text/plain"]
    assert "one  failed after" in final and "2/3" not in final


def test_the_display_is_not_sent_again_while_nothing_changes() -> None:
    displays = ipython.Displays()
    listener = NotebookListener([], displays.display)
    for _ in range(3):
        listener.show()
    assert len(displays.contents[0]) == 1


def test_text_from_a_model_cannot_become_markup_of_the_page() -> None:
    displays = ipython.Displays()
    node = Pipeline(toy.pipeline()).nodes["one"]
    with NotebookListener([node], displays.display) as listener:
        listener.stage_event(node, {"event": "note", "message": "<script>alert(1)</script> [bold]x[/bold] \x1b[2J {x}"})
    shown = displays.contents[0][-1]["text/html"]
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "[bold]x[/bold] \\x1b[2J {x}" in shown


def test_a_failed_stage_leaves_its_line(tmp_path: Path, displays: ipython.Displays) -> None:
    with pytest.raises(StageFailed):
        Pipeline(toy.pipeline(one={"crash": "exit"})).run(store=tmp_path, progress=True)
    assert "✗ one" in displays.contents[0][-1]["text/plain"]


@pytest.mark.parametrize("has_ipython", [True, False])
def test_a_script_prints_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_ipython: bool
) -> None:
    if has_ipython:
        ipython.install(monkeypatch, kernel=False)
    assert not is_in_notebook()
    listener: Any = progress_listener([])
    assert type(listener) is ConsoleListener
    Pipeline(toy.pipeline()).run(store=tmp_path, only="one", progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["▸", "one"], ["✓", "one"]]


def test_a_run_is_silent_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pipeline(toy.pipeline()).run(store=tmp_path, only="one")
    assert capsys.readouterr().out == ""


def test_progress_and_a_listener_are_not_taken_together(refused: Refused, tmp_path: Path) -> None:
    refused(lambda: Pipeline(toy.pipeline()).run(store=tmp_path / "store", progress=True, listener=Listener()))
    assert not (tmp_path / "store").exists()
