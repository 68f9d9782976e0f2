"""What a run's stages are said to be, and what ends it: runs of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from align.errors import StageFailed
from align.runner.runner import run_pipeline
from align.runs.run_page import stored_outline
from align.runs.status import stop_processes
from tests.support import toy


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def states(store: Path, capsys: pytest.CaptureFixture[str], run: str = "toy") -> dict[str, str]:
    capsys.readouterr()
    assert main(["status", run, "--store", str(store), "--json"]) == 0
    return {row["stage"]: f"{row['state']}: {row['what']}" for row in json.loads(capsys.readouterr().out)[run]}


def test_each_stage_is_said_to_be_what_it_is(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--store", str(store)]) == 0
    assert "this store has no runs yet" in capsys.readouterr().out
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(toy.pipeline(two={"crash": "bug"})), store=store)
    stages = states(store, capsys)
    assert stages["one"].startswith("done: 20")
    assert stages["two"] == "failed: ValueError: a bug"
    assert stages["total"] == "not begun: "
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(toy.pipeline(two={"crash": "kill"})), store=store)
    assert states(store, capsys)["two"] == "stopped: 2/3 steps, resumes from its checkpoint"
    assert main(["status", "--store", str(store)]) == 0
    index = store.resolve() / "reports" / "index.html"
    assert capsys.readouterr().out == f"toy  1 done, 1 stopped, 1 not begun\nAll runs: {index}\n"
    assert main(["status", "toi", "--store", str(store)]) == 2
    assert "Did you mean 'toy'?" in capsys.readouterr().err
    assert main(["cancel", "toy", "twoo", "--store", str(store)]) == 2
    assert "run 'toy' has no such stage. Did you mean 'two'?" in capsys.readouterr().err
    assert main(["cancel", "toy", "--store", str(store)]) == 0
    assert capsys.readouterr().out == "'toy' has nothing that waits or runs\n"


def test_index_links_the_pages_of_all_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        with pytest.raises(StageFailed):
            run_pipeline(Pipeline(toy.pipeline(two={"crash": "bug"}) | {"name": name}), store=store)
    assert main(["report", "second", "--store", str(store)]) == 0
    assert main(["status", "--store", str(store)]) == 0
    html = (store / "reports" / "index.html").read_text(encoding="utf-8")
    assert html.index(">second</a>") < html.index("first"), "the last run comes first"
    assert 'href="second/report.html"' in html and 'href="first/report.html"' not in html
    assert (store / "reports" / "second" / "report.html").is_file()
    assert html.count("1 done, 1 failed, 1 not begun") == 2 and html.count("two failed: ValueError: a bug") == 2


def test_a_run_of_this_machine_is_seen_and_ended(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: dict[str, Any] = toy.pipeline(one={"steps": 400, "pause": 0.1})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", "run", "toy.yaml", "--store", str(store)], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while len(list(store.glob("number/*.partial/checkpoints/step-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    stages = states(store, capsys)["one"]
    assert stages.startswith(f"runs: process {process.pid} on ") and "/400 steps" in stages and "silent" not in stages
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now + 330)
        assert re.search(r"/400 steps, silent for 5m \d+s$", states(store, capsys)["one"])
    assert main(["cancel", "toy", "--store", str(store)]) == 0
    assert capsys.readouterr().out == f"ended process {process.pid}; finished stages and checkpoints are kept\n"
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert states(store, capsys)["one"].startswith("stopped: ")


def test_a_file_names_its_own_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    for name in ("one", "two"):
        raw = {**toy.pipeline(), "name": name, "runtime": {"store": {"folder": f"store-{name}"}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        run_pipeline(Pipeline.load(tmp_path / f"{name}.yaml"))
    capsys.readouterr()
    assert main(["status", "one.yaml", "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)["one"]} == {"done"}
    assert main(["cancel", "one.yaml"]) == 0
    assert main(["compare", "one.yaml", "two.yaml"]) == 2
    assert "one.yaml and two.yaml name different stores (runtime.store)" in capsys.readouterr().err
    assert main(["compare", "a=one.yaml", "b=one.yaml"]) == 0
    assert not (tmp_path / "store").exists()


def test_process_of_same_named_machine_is_kept(store: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=store)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        claim = {"host": socket.gethostname(), "machine": "other-boot pid:[1]", "pid": sleeper.pid}
        fake = SimpleNamespace(is_locked=lambda *_: True, holder_of=lambda *_: claim)
        outline = stored_outline("toy", run.store.runs()["toy"])
        assert stop_processes(outline, fake, set()) == []  # type: ignore[arg-type]
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
