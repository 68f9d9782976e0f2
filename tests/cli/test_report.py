"""The page after every run, however it ended, and ``align report`` as a user types it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.cli.report import Watch
from align.pipeline.pipeline import Pipeline
from align.runs import run_page
from align.runs.run_page import outline_of, stored_outline, write_page
from align.store.store import Store
from tests.support import toy

Capture = pytest.CaptureFixture[str]
FAST = "stages.two.number=5"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def finished_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished run; read-only by agreement."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy.pipeline(), sort_keys=False))
    assert ran(folder / "toy.yaml", folder / "store") == 0
    return folder / "store"


@pytest.fixture
def finished(finished_store: Path, store: Path) -> Path:
    """A finished run's store, a copy that a test may change."""
    shutil.copytree(finished_store, store)
    return store


def ran(file: Path, store: Path, *words: str) -> int:
    return main(["run", str(file), "--store", str(store), *words])


def boxes(store: Path) -> dict[str, str]:
    """Status of every stage in the picture of the pipeline."""
    text = page_of(store).read_text()
    outline = re.findall(r'<g class="box (\w+)"><title>(\w+)</title>', text)
    return {name: status for status, name in outline}


def page_of(store: Path, name: str = "toy") -> Path:
    return store / "reports" / name / "report.html"


def test_a_run_leaves_a_page_and_says_where_once(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    assert ran(pipeline_file, store) == 0
    message = capsys.readouterr().out
    assert message.count("Report: ") == 1 and message.rstrip().endswith(f"Report: {page_of(store).resolve()}")
    text = page_of(store).read_text()
    assert "<title>toy</title>" in text and "loss over steps" in text
    assert 'id="failure"' not in text


def test_page_of_failed_run_has_error_log_and_pending(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    assert ran(pipeline_file, store, "--set", "stages.two.crash=bug") == 1
    captured = capsys.readouterr()
    assert "stage 'two' failed: ValueError: a bug" in captured.err
    assert str(page_of(store).resolve()) in captured.out
    text = page_of(store).read_text()
    failure = text[text.index('id="failure"') : text.index("</section>", text.index('id="failure"'))]
    assert "two" in failure and "ValueError: a bug" in failure and "total" in failure
    assert "Traceback" in failure, "the end of its log is on the page"
    assert boxes(store) == {"one": "done", "two": "failed", "total": "pending"}


def test_the_curves_of_a_killed_stage_are_on_the_page(pipeline_file: Path, store: Path) -> None:
    assert ran(pipeline_file, store, "--set", "stages.one.crash=kill") == 1
    text = page_of(store).read_text()
    assert "loss over steps" in text and "SIGKILL" in text
    assert ran(pipeline_file, store, "--set", "stages.one.crash=kill") == 0
    assert 'id="failure"' not in page_of(store).read_text(), "the page is about the last run"


def test_a_stage_that_refuses_its_input_ends_with_2_and_a_page(pipeline_file: Path, store: Path) -> None:
    assert ran(pipeline_file, store, "--set", "stages.two.crash=user") == 2
    assert "the dataset is empty after filtering." in page_of(store).read_text()


def test_a_rebuild_that_fails_is_not_shown_as_finished(pipeline_file: Path, store: Path, tmp_path: Path) -> None:
    switch = tmp_path / "fail"
    raw = {"name": "toy", "stages": {"one": {"stage": "tests.support.cli.gated_stages:SWITCHED", "file": str(switch)}}}
    pipeline_file.write_text(yaml.safe_dump(raw))
    assert ran(pipeline_file, store) == 0
    switch.touch()
    assert ran(pipeline_file, store, "--rebuild", "one") == 1
    assert "switched off" in page_of(store).read_text()
    assert boxes(store) == {"one": "failed"}
    assert "0 stages ·" in page_of(store).read_text(), "what it was before is not counted as made"


def test_nothing_begun_leaves_no_page(pipeline_file: Path, store: Path) -> None:
    assert ran(pipeline_file, store, "--set", "stages.two.numbr=1") == 2
    assert ran(pipeline_file, store, "--only", "total") == 2
    assert not (store / "reports").exists()


def test_only_shows_what_there_is(pipeline_file: Path, store: Path) -> None:
    assert ran(pipeline_file, store, "--only", "two") == 0
    assert boxes(store) == {"two": "done", "one": "pending", "total": "pending"}
    assert ran(pipeline_file, store) == 0
    assert boxes(store) == {"one": "done", "two": "cached", "total": "done"}


def test_a_stopped_run_has_a_page(pipeline_file: Path, store: Path) -> None:
    words = ["run", str(pipeline_file), "--store", str(store), "--set", "stages.two.pause=20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": "."},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.time() + 60
    while time.time() < deadline and not list(store.glob("number/*.partial/log.txt")):
        time.sleep(0.1)
    while time.time() < deadline and len(list(store.glob("number/*/record.json"))) < 1:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "The same command continues." in err and str(page_of(store).resolve()) in out
    text = page_of(store).read_text()
    assert "stopped before it was done" in text and "Stage two was stopped" in text


def test_an_error_in_the_report_changes_nothing_else(
    pipeline_file: Path, store: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no\x1b[31m figure")

    monkeypatch.setattr("align.report.run.run_report.write_report", fail)
    assert ran(pipeline_file, store) == 0
    captured = capsys.readouterr()
    assert "note: the report could not be written: ValueError: no\\x1b[31m figure" in captured.err
    assert "Report:" not in captured.out and "total 3" in captured.out
    assert ran(pipeline_file, store, "--set", "stages.two.crash=bug") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
    ids=["full", "quota", "copy"],
)
def test_report_on_a_full_disk_keeps_the_page(
    error: OSError, finished: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = page_of(finished).read_bytes()

    def fail(path: Path, data: bytes) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("align.store.json_files.Path.write_bytes", fail)
        (page_of(finished).parent / run_page.STAMP).unlink()
        assert main(["report", "toy", "--store", str(finished)]) == 1
        assert capsys.readouterr().err.startswith("no space left on the disk; free some (`align gc` lists")
    assert page_of(finished).read_bytes() == before
    assert main(["report", "toy", "--store", str(finished)]) == 0
    with pytest.raises(PermissionError), monkeypatch.context() as patched:
        error = PermissionError(errno.EACCES, "Permission denied")
        patched.setattr("align.store.json_files.Path.write_bytes", fail)
        (page_of(finished).parent / run_page.STAMP).unlink()
        main(["report", "toy", "--store", str(finished)])


def test_a_page_of_the_same_is_not_written_again(pipeline_file: Path, finished: Path) -> None:
    store = finished
    before = page_of(store).stat().st_mtime_ns
    assert ran(pipeline_file, store) == 0
    assert page_of(store).stat().st_mtime_ns == before
    page_of(store).unlink()
    assert ran(pipeline_file, store) == 0
    second = page_of(store).stat().st_mtime_ns
    assert ran(pipeline_file, store, "--rebuild", "two") == 0
    third = page_of(store).stat().st_mtime_ns
    assert third > second
    assert main(["report", "toy", "--store", str(store)]) == 0
    assert page_of(store).stat().st_mtime_ns > third, "asked for, it is written anew"


@pytest.mark.parametrize("name", ["report.html", ".written"])
def test_a_damaged_page_is_written_again(pipeline_file: Path, finished: Path, name: str) -> None:
    page = page_of(finished)
    (page.parent / name).write_bytes(page.read_bytes()[:100])
    assert ran(pipeline_file, finished) == 0
    assert page.read_text(encoding="utf-8").endswith("</html>")
    written = page.stat().st_mtime_ns
    assert ran(pipeline_file, finished) == 0
    assert page.stat().st_mtime_ns == written, "a whole one stays"


def test_page_has_one_writer_at_a_time(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as on a file system that keeps such locks on each machine
    inside: list[int] = []
    most: list[int] = []

    def write(artifacts: Any, folder: Any, page: Path, **_: Any) -> Path:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.3)
        inside.pop()
        page.write_text("x")
        return page

    monkeypatch.setattr("align.report.run.run_report.write_report", write)
    opened = Store.open(finished)
    run = stored_outline("toy", opened.runs()["toy"])
    writers = [threading.Thread(target=write_page, args=(run, opened)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert most == [1, 1, 1]


def test_the_garbage_collector_leaves_pages_alone(finished: Path, capsys: Capture) -> None:
    store = finished
    assert main(["gc", "--delete", "--store", str(store)]) == 0
    assert "0 folders" in capsys.readouterr().out
    assert page_of(store).is_file()
    assert len(Store.open(store).all()) == 3


def test_failed_gates_end_with_1_after_the_page(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    raw = toy.pipeline()
    raw["stages"]["gates"] = {"stage": "tests.support.cli.gated_stages:GATED", "failed": ["kl_to_sft 17 > 15\x1b[2J"]}
    pipeline_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    for _ in range(2):  # cached, they are as failed as before
        assert ran(pipeline_file, store) == 1
        captured = capsys.readouterr()
        assert captured.err == "gate failed: kl_to_sft 17 > 15\\x1b[2J\n"
        assert captured.out.rstrip().endswith(str(page_of(store).resolve()))
    assert ran(pipeline_file, store, "--json") == 1
    assert json.loads(capsys.readouterr().out)["failed_gates"] == ["kl_to_sft 17 > 15\x1b[2J"]
    assert ran(pipeline_file, store, "--set", "stages.gates.failed=[]") == 0


def test_json_has_the_page(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    assert ran(pipeline_file, store, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(page_of(store).resolve()) and document["failed_gates"] == []


def test_the_title_is_that_of_the_report_stage(pipeline_file: Path, store: Path) -> None:
    raw = toy.pipeline()
    raw["stages"]["report"] = {"stages": ["one"], "title": "About <one>"}
    pipeline_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    assert ran(pipeline_file, store) == 0
    assert "<title>About &lt;one&gt;</title>" in page_of(store).read_text()


# --- align report -----------------------------------------------------------------------------------------------------


def test_report_by_name_by_file_and_by_default(
    pipeline_file: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    store = finished
    second_file = tmp_path / "other.yaml"
    second_file.write_text(yaml.safe_dump({**toy.pipeline(one={"number": 7}), "name": "other"}, sort_keys=False))
    assert ran(second_file, store) == 0
    for words, name in ((["toy"], "toy"), ([str(pipeline_file)], "toy"), ([], "other")):
        page_of(store, name).unlink()
        capsys.readouterr()
        assert main(["report", *words, "--store", str(store)]) == 0
        assert capsys.readouterr().out == f"Report: {page_of(store, name).resolve()}\n"
        assert page_of(store, name).is_file()
    assert main(["report", "toy", "--store", str(store), "--json", "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "toy", "path": str((tmp_path / "out" / "report.html").resolve()),
    }  # fmt: skip
    assert "one" in (tmp_path / "out" / "report.html").read_text()


def test_report_of_a_failed_run_finds_the_failure_in_the_store(pipeline_file: Path, store: Path) -> None:
    ran(pipeline_file, store, "--set", "stages.two.crash=bug")
    page_of(store).unlink()
    assert main(["report", "toy", "--store", str(store)]) == 0
    text = page_of(store).read_text()
    assert "ValueError: a bug" in text and "Traceback" in text


def test_report_while_a_stage_is_being_made(pipeline_file: Path, store: Path) -> None:
    ran(pipeline_file, store, "--set", "stages.two.crash=exit")
    opened = Store.open(store)
    entry = opened.runs()["toy"]["stages"]["two"]
    with opened.lock(entry["kind"], entry["key"], lambda _: None):
        assert main(["report", "toy", "--store", str(store)]) == 0
        assert "running now; this page shows its state" in page_of(store).read_text()
        assert boxes(store)["two"] == "running"
    assert main(["report", "toy", "--store", str(store)]) == 0
    assert "running now; this page shows its state" not in page_of(store).read_text()


def test_report_opens_a_browser_or_says_that_there_is_none(
    finished: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = finished
    calls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: calls.append(url) or True)
    assert main(["report", "toy", "--store", str(store)]) == 0
    assert calls == []
    assert main(["report", "toy", "--store", str(store), "--open"]) == 0
    assert calls == [page_of(store).resolve().as_uri()]
    assert "no browser" not in capsys.readouterr().err
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert main(["report", "toy", "--store", str(store), "--open"]) == 0
    captured = capsys.readouterr()
    assert "no browser could be started here" in captured.err and str(page_of(store).resolve()) in captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "toi"], "toi: neither a pipeline file nor a run of the store {store}. Did you mean 'toy'?"),
        (["report", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["report", "toy", "--output", "{file}"], "is a file; name a folder."),
        (["report", "toy", "--opne"], "Did you mean '--open'?"),
    ],
)
def test_mistakes_of_report(
    words: list[str], message: str, pipeline_file: Path, finished: Path, capsys: Capture
) -> None:
    store = finished
    assert main([word.format(file=pipeline_file) for word in words] + ["--store", str(store)]) == 2
    captured = capsys.readouterr()
    assert message.format(store=store) in captured.err and captured.out == ""


def test_an_empty_store_has_nothing_to_report(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    assert main(["report", "--store", str(store)]) == 2
    assert "this store has no runs yet" in capsys.readouterr().err
    assert main(["report", "toy", "--store", str(store)]) == 2
    assert "This store has no runs yet." in capsys.readouterr().err
    assert main(["report", str(pipeline_file), "--store", str(store)]) == 2
    assert "no stage is finished yet" in capsys.readouterr().err


def test_watch_writes_the_page_until_the_run_ends(pipeline_file: Path, store: Path, capsys: Capture) -> None:
    run = threading.Thread(target=ran, args=(pipeline_file, store, "--set", "stages.two.pause=0.6"))
    texts = []

    def look(seconds: float) -> None:
        assert seconds >= 1  # more where drawing takes long
        if page_of(store).is_file():
            texts.append(page_of(store).read_text())
        time.sleep(0.2)

    outline = outline_of(Pipeline.load(str(pipeline_file), {"stages.two.pause": 0.6}))
    shown: list[Path] = []
    run.start()
    page = Watch(outline, Store(store), None, 1.0, look).follow(shown.append)
    run.join()
    assert page == page_of(store) and shown == [page]
    assert any('data-refresh="1"' in text and "Stage two is running" in text for text in texts)
    assert "data-refresh" not in page.read_text(), "the last page reloads no more"
    assert boxes(store) == {"one": "done", "two": "done", "total": "done"}


def test_watch_ends_after_a_quiet_while_or_by_the_reader(
    pipeline_file: Path, store: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ran(pipeline_file, store, "--set", "stages.two.crash=bug") == 1
    outline = stored_outline("toy", Store(store).survey_runs()[0]["toy"])

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    page = Watch(outline, Store(store), None, 1.0, interrupt).follow(lambda _: None)
    assert page is not None and "data-refresh" not in page.read_text()
    monkeypatch.setattr("align.cli.report.QUIET_SECONDS", 0.0)
    # While Slurm does not answer, nobody knows whether a job of the run waits.
    monkeypatch.setattr("align.runs.status.live_jobs", lambda *_: ({}, "squeue: timed out"))
    assert Watch(outline, Store(store), None, 1.0)._is_active()
    monkeypatch.setattr("align.runs.status.live_jobs", lambda *_: ({}, ""))
    capsys.readouterr()
    assert main(["report", "toy", "--watch", "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Watches toy until it ends; Ctrl-C stops watching") and out.endswith("reloads no more.\n")
    assert "ValueError: a bug" in page_of(store).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--every", "0"], "--every 0: should be 1 to 3600 seconds."),
        (["--every", "nan"], "--every nan: should be 1 to 3600 seconds."),
        (["--json"], "leave out --json"),
    ],
)
def test_watch_refuses_what_it_cannot_do(finished_store: Path, capsys: Capture, words: list[str], message: str) -> None:
    assert main(["report", "toy", "--watch", "--store", str(finished_store), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_page_s_seal_reads_no_file_but_the_page_s(tmp_path: Path) -> None:
    """A user may write it into a folder with a whole store."""
    (tmp_path / "report.html").write_text("page")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "runs.csv").write_text("a,b")
    seal = run_page._seal("stamp", tmp_path)
    (tmp_path / "store" / "sft").mkdir(parents=True)
    (tmp_path / "store" / "sft" / "model.safetensors").write_text("weights")
    (tmp_path / "thesis.tex").write_text("x")
    assert run_page._seal("stamp", tmp_path) == seal
    (tmp_path / "tables" / "runs.csv").write_text("a,c")
    assert run_page._seal("stamp", tmp_path) != seal
