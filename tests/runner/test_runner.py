import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import StageFailed, UserError
from align.runner import huge_pages
from align.runner.fork_server import ForkServer
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.runner.stage_process import stage_environment, this_thread
from align.runner.stage_result import read_attempts
from align.store.store import Store
from tests.support import toy
from tests.support.records import change_record
from tests.support.refusals import Refused
from tests.support.runs import Recorder, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def actions(raw: dict[str, Any], store: Path) -> dict[str, str]:
    return {step.node.name: step.action for step in plan(Pipeline(raw), Store.open(store))}


def test_a_run_makes_every_stage_once_and_a_second_run_none(store: Path) -> None:
    pipeline = Pipeline(toy.pipeline())
    recorder = Recorder()
    run = pipeline.run(store=store, listener=recorder)
    assert run.ran == ["one", "two", "total"]
    assert (run.artifacts["total"].path / "number.txt").read_text() == "3"
    assert ("progress", 3) in recorder.said
    assert ("metrics", 2) in recorder.said
    record = run.artifacts["total"].record
    assert record["metrics"] == {"total": 3}
    assert record["inputs"] == {"first": pipeline.nodes["one"].key, "others": [pipeline.nodes["two"].key]}
    assert list(record["outputs"]) == ["number.txt"]
    assert run.artifacts["one"].record["tokens"] == 7
    assert pipeline.run(store=store).ran == []
    assert not list(store.glob("*/*.partial"))


@pytest.mark.skipif(not ForkServer.is_possible(), reason="this system cannot fork with libraries imported")
def test_stages_of_tests_are_forked(store: Path) -> None:
    """A stage that the interpreter starts imports its libraries itself: 0.4 s, and 9 s where it loads a model."""
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    assert this_thread.server is not None
    assert this_thread.server.serves([sys.executable, "a folder"], stage_environment(), 1)


@pytest.mark.parametrize("pages", ["2 MiB", "4 KiB"])
def test_stage_has_the_pages_that_are_fast(store: Path, monkeypatch, pages: str) -> None:
    monkeypatch.setattr(huge_pages, "has_fast_huge_pages", lambda: pages == "2 MiB")
    monkeypatch.delenv("GLIBC_TUNABLES")
    huge_pages.page_environment.cache_clear()
    expected = "glibc.malloc.hugetlb=1" if pages == "2 MiB" else None
    assert environment_of_stage(store, 1).get("GLIBC_TUNABLES") == expected
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert environment_of_stage(store, 2)["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def environment_of_stage(store: Path, seed: int) -> dict[str, str]:
    """Return the variables of a stage's process."""
    raw = {"name": "toy", "seed": seed, "stages": {"env": {"stage": "tests.support.toy:ENV"}}}
    artifact = run_pipeline(Pipeline(raw), store=store).artifacts["env"]
    variables: dict[str, str] = json.loads((artifact.path / "environment.json").read_text())
    return variables


def test_deterministic_run_restricts_kernels_of_stages(store: Path) -> None:
    def environment(seed: int, runtime: dict[str, Any]) -> dict[str, str]:
        raw = {"name": "toy", "seed": seed, "runtime": runtime, "stages": {"env": {"stage": "tests.support.toy:ENV"}}}
        artifact = run_pipeline(Pipeline(raw), store=store).artifacts["env"]
        return json.loads((artifact.path / "environment.json").read_text())

    # What cuBLAS must have, set by the same function that restricts torch (tests/models/compute/test_determinism.py).
    assert environment(1, {"deterministic": True})["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment(2, {})


def test_plan_reads_each_record_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    surveys = []
    survey = Store.survey
    monkeypatch.setattr(Store, "survey", lambda self: surveys.append(1) or survey(self))
    changed = Pipeline(toy.pipeline(one={"number": 5}, two={"number": 6}))
    assert [step.why for step in plan(changed, Store.open(store))][:2] == ["number: 1 → 5", "number: 2 → 6"]
    assert len(surveys) == 1
    assert {step.action for step in plan(Pipeline(toy.pipeline()), Store.open(store))} == {"cached"}
    assert len(surveys) == 1


def test_changed_field_reruns_dependents_and_is_explained(store: Path) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    changed = toy.pipeline(two={"number": 5})
    steps = plan(Pipeline(changed), Store.open(store))
    assert [step.action for step in steps] == ["cached", "run", "run"]
    assert steps[1].changes == ("number: 2 → 5",)
    assert steps[2].changes == ("input others changed (two)",)
    assert run_pipeline(Pipeline(changed), store=store).ran == ["two", "total"]


@pytest.mark.parametrize(
    ("crash", "error", "expected"),
    [
        ("user", UserError, "stage 'one': the dataset is empty after filtering."),
        ("bug", StageFailed, "stage 'one' failed: ValueError: a bug\nLog: "),
        ("disk", StageFailed, "no space left on the disk"),
        ("exit", StageFailed, "exit code 9"),
        ("kill", StageFailed, "SIGKILL"),
    ],
)
def test_a_failing_stage_says_why_and_publishes_nothing(
    store: Path, crash: str, error: type[Exception], expected: str
) -> None:
    raw = toy.pipeline(one={"crash": crash})
    with pytest.raises(error) as caught:
        run_pipeline(Pipeline(raw), store=store)
    assert expected in str(caught.value)
    assert Store.open(store).all() == []
    if error is StageFailed:
        log = Path(str(caught.value).rpartition("Log: ")[2])
        assert log.is_file()
        assert ("Traceback" in log.read_text()) == (crash in ("bug", "disk"))


def test_a_killed_stage_resumes_from_its_checkpoints(store: Path) -> None:
    raw = toy.pipeline(one={"crash": "kill", "pause": 0.3})
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(raw), store=store)
    assert actions(raw, store)["one"] == "resume"
    (partial,) = store.glob("number/*.partial")
    assert len(read_attempts(partial)) == 1
    recorder = Recorder()
    run = run_pipeline(Pipeline(raw), store=store, listener=recorder)
    assert ("resumed", "one") in recorder.said
    assert run.metrics("one")["resumed_at"] == 2
    assert ("progress", 1) not in recorder.said[: recorder.said.index(("started", "two"))]
    record = run.artifacts["one"].record
    killed, last = record["attempts"]
    assert killed >= 0.6 and last >= 0.3  # two steps and one, each with its pause
    assert record["seconds"] == pytest.approx(killed + last, abs=0.011)


def test_runner_killed_before_publishing_loses_no_work(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(Pipeline(toy.pipeline()), store=store)
    monkeypatch.undo()
    recorder = Recorder()
    run_pipeline(Pipeline(toy.pipeline()), store=store, listener=recorder)
    assert ("started", "one") not in recorder.said
    assert ("started", "two") in recorder.said
    (record,) = [artifact.record for artifact in Store.open(store).all() if artifact.stage == "one"]
    assert record["attempts"] == [record["seconds"]]


def test_a_corrupted_artifact_is_found_and_rebuilt_on_request(refused: Refused, store: Path) -> None:
    pipeline = Pipeline(toy.pipeline())
    path = run_pipeline(pipeline, store=store).artifacts["one"].path / "number.txt"
    path.write_text("8")
    assert actions(toy.pipeline(), store)["one"] == "damaged"
    refused(run_pipeline, pipeline, store=store)
    assert run_pipeline(pipeline, store=store, rebuild=("one",)).ran == ["one"]
    assert run_pipeline(pipeline, store=store, rebuild="one").ran == ["one"]
    assert path.read_text() == "1"
    path.unlink()
    refused(run_pipeline, pipeline, store=store)


def test_damage_with_old_file_times_is_detected_on_reading(refused: Refused, store: Path) -> None:
    path = run_pipeline(Pipeline(toy.pipeline()), store=store).artifacts["one"].path / "number.txt"
    stat = path.stat()
    path.write_text("8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(lambda: run_pipeline(Pipeline(toy.pipeline(total={"scale": 2.0})), store=store))


def test_from_only_and_rebuild(refused: Refused, store: Path) -> None:
    pipeline = Pipeline(toy.pipeline())
    refused(run_pipeline, pipeline, store=store, only="total")
    assert run_pipeline(pipeline, store=store, only="one").ran == ["one"]
    run_pipeline(pipeline, store=store)
    assert run_pipeline(pipeline, store=store, from_="two").ran == ["two", "total"]
    assert run_pipeline(pipeline, store=store, rebuild=("one",)).ran == ["one"]
    refused(run_pipeline, pipeline, store=store, from_="totl")


def test_two_runs_make_a_shared_stage_once(store: Path) -> None:
    raw = toy.pipeline(one={"pause": 0.3})
    first, second = Recorder(), Recorder()
    threads = [
        threading.Thread(target=run_pipeline, args=(Pipeline(raw),), kwargs={"store": store, "listener": recorder})
        for recorder in (first, second)
    ]
    threads[0].start()
    time.sleep(0.4)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert ("started", "one") in first.said
    assert ("started", "one") not in second.said
    assert any(label == "waits" and str(os.getpid()) in str(speaker) for label, speaker in second.said)


def test_other_source_code_warns_and_strict_refuses(refused: Refused, store: Path) -> None:
    pipeline = Pipeline(toy.pipeline())
    change_record(run_pipeline(pipeline, store=store).artifacts["one"].path, source="other")
    recorder = Recorder()
    run_pipeline(pipeline, store=store, listener=recorder)
    assert any(label == "warning" and "same stage version: one" in text for label, text in recorder.said)
    refused(run_pipeline, pipeline, store=store, strict=True)
    # The remedy works, without a warning, and a run of a stage that does not read it is not refused.
    assert run_pipeline(pipeline, store=store, strict=True, only="two").ran == []
    recorder = Recorder()
    assert run_pipeline(pipeline, store=store, strict=True, rebuild=("one",), listener=recorder).ran[0] == "one"
    assert not any(label == "warning" for label, _ in recorder.said)


def test_ctrl_c_ends_the_stage_and_the_next_run_resumes(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    raw = toy.pipeline(one={"pause": 0.5, "steps": 8})
    # a shell that starts a job in the background has it ignore SIGINT, which children inherit
    script.write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from align import Pipeline\nPipeline({raw!r}).run(store={str(store)!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE)
    wait_for(lambda: list(store.glob("number/*.partial/checkpoints/step-1")))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert actions(raw, store)["one"] == "resume"
    quick = toy.pipeline(one={"pause": 0.5, "steps": 8})
    run = run_pipeline(Pipeline(quick), store=store)
    assert run.metrics("one")["resumed_at"] >= 2
    assert run.artifacts["one"].record["attempts"][0] >= 1.0  # of the attempt that was ended, two steps at least


def test_a_killed_runner_takes_its_stage_along(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    raw = toy.pipeline(one={"pause": 0.3, "steps": 50})
    script.write_text(f"from align import Pipeline\nPipeline({raw!r}).run(store={str(store)!r})\n")
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    wait_for(lambda: list(store.glob("number/*.partial/checkpoints/step-0")))
    (partial,) = store.glob("number/*.partial")
    wait_for(lambda: sum(read_attempts(partial)) >= 1.0)  # noted while the stage runs, not at its end
    process.kill()
    process.wait()
    time.sleep(0.7)
    before = len(list(store.glob("number/*.partial/checkpoints/*")))
    time.sleep(0.9)
    assert len(list(store.glob("number/*.partial/checkpoints/*"))) == before


def test_the_store_can_be_moved(store: Path, tmp_path: Path) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    moved = tmp_path / "moved"
    shutil.move(store, moved)
    assert run_pipeline(Pipeline(toy.pipeline()), store=moved).ran == []


def test_a_disk_too_full_for_the_result_itself_is_named(
    refused: Refused, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store.parent)
    monkeypatch.setattr("align.errors.shutil.disk_usage", lambda folder: usage._replace(free=4096))
    refused(lambda: run_pipeline(Pipeline(toy.pipeline(one={"crash": "exit"})), store=store))


def test_a_disk_full_when_the_runner_publishes_loses_no_work(
    refused: Refused, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "publish", full)
        refused(lambda: run_pipeline(Pipeline(toy.pipeline()), store=store))
    (log,) = store.glob("*/*.partial/log.txt")
    before = log.read_text()
    assert run_pipeline(Pipeline(toy.pipeline()), store=store).ran == ["one", "two", "total"]
    (published,) = [a.path / "log.txt" for a in Store.open(store).all() if a.stage == "one"]
    assert published.read_text() == before  # the finished attempt was published, not repeated
