"""A store that several machines use, and that is full or away for a while."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import StageFailed
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.store import store as store_module
from align.store.retry import Retry, StoreUnreachable, is_unreachable
from align.store.store import Store
from tests.support import toy
from tests.support.refusals import Refused
from tests.support.runs import Recorder, outcome, published, start, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def leased(seconds: float, **changes: dict[str, Any]) -> dict[str, Any]:
    return {**toy.pipeline(**changes), "runtime": {"store": {"lease": seconds}}}


# ---- several machines -----------------------------------------------------------------------------------------------


def test_two_machines_make_each_stage_once(store: Path) -> None:
    raw = leased(60, one={"pause": 0.2}, two={"pause": 0.2})
    both = [outcome(process) for process in [start(raw, store, name) for name in ("here", "there")]]
    assert sorted(both[0]["ran"] + both[1]["ran"]) == ["one", "total", "two"]
    artifacts = Store.open(store).all()
    assert len(artifacts) == 3
    assert not any(Store.open(store).problems(artifact, thorough=True) for artifact in artifacts)


def test_machine_that_lost_its_lock_does_not_publish(store: Path) -> None:
    raw = leased(1, one={"pause": 0.6, "steps": 6})
    asleep = start(raw, store, "there")
    wait_for(lambda: list(store.glob("number/*.partial/checkpoints/step-1")), 60)
    (partial,) = store.glob("number/*.partial")
    stage = children(asleep.pid)
    for pid in (asleep.pid, *stage):
        os.kill(pid, signal.SIGSTOP)
    recorder = Recorder()
    try:
        run = run_pipeline(Pipeline(raw), store=store, listener=recorder)
    finally:
        for pid in (asleep.pid, *stage):
            os.kill(pid, signal.SIGCONT)
    assert run.ran == ["one", "two", "total"]
    assert any(label == "waits" for label, _ in recorder.said)
    assert run.metrics("one")["resumed_at"] >= 2  # from the other's checkpoints
    back = outcome(asleep)
    assert back["ran"] == []
    assert ["cached", "one"] in back["said"]
    assert any(label == "warning" and "while this run was silent" in text for label, text in back["said"])
    artifact = Store.open(store).find("number", run.artifacts["one"].record["key"])
    assert artifact is not None and artifact.record == run.artifacts["one"].record
    assert not partial.exists() or not (partial / "output").exists()


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(entry) for file in Path(f"/proc/{pid}/task").glob("*/children") for entry in file.read_text().split()]


def test_late_publication_does_not_replace_another(store: Path) -> None:
    """The holder is silent between its last look and the rename: the path it would move is gone by then."""
    opened = Store.open(store, lease=1)
    artifact = published(opened)
    record, key = artifact.record, artifact.record["key"]
    shutil.rmtree(artifact.path)
    with opened.lock("number", key, lambda _: None) as hold:
        output = opened.partial("number", key) / "output"
        output.mkdir(parents=True)
        (output / "number.txt").write_text("half")
        chosen = hold.claims.folder / str(hold.number + 1)
        shutil.copyfile(hold.claims.folder / str(hold.number), chosen)  # as another does after a silence
        opened._take_over("number", key, type("", (), {"number": hold.number + 1})())
        with pytest.raises(FileNotFoundError):
            output.rename(artifact.path)
        with pytest.raises(store_module.LockLost, match="while this run was silent"):
            opened.publish(output, dict(record), hold)
        assert opened.partial("number", key).name == f"{key[:12]}.{hold.number + 1}.partial"
        assert (opened.partial("number", key) / "output" / "number.txt").read_text() == "half"
    assert opened.find("number", key) is None


def test_rebuild_keeps_another_run_s_new_artifact(refused: Refused, store: Path) -> None:
    opened = Store.open(store)
    artifact = published(opened)
    output = store / "number" / "late.partial" / "output"
    shutil.copytree(artifact.path, output)
    (output / "record.json").unlink()
    with opened.lock("number", artifact.record["key"], lambda _: None) as hold:
        before = type(artifact)("one", artifact.kind, artifact.path, {**artifact.record, "created": "long ago"})
        refused(opened.publish, output, {**artifact.record, "created": "now"}, hold, before)
        new_artifact = opened.publish(output, {**artifact.record, "created": "now"}, hold, artifact)
    assert new_artifact.record["created"] == "now"


def test_missing_record_is_looked_up_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS remembers that a name is missing, until something of one's own changes the folder."""
    raw = toy.pipeline(one={"pause": 0.4})
    second_run = start(raw, store)
    wait_for(lambda: list(store.glob("number/*.partial/checkpoints/step-0")), 60)
    read, forget, stale = Store._read, store_module.drop_nfs_cache, [True]
    key = Pipeline(raw).nodes["one"].key

    def cached(self: Store, folder: Path, stage: str = "") -> Any:
        return None if stale[0] and folder.name == key[:12] else read(self, folder, stage)

    def look(folder: Path) -> None:
        forget(folder)
        stale[0] = False

    monkeypatch.setattr(Store, "_read", cached)
    monkeypatch.setattr(store_module, "drop_nfs_cache", look)
    recorder = Recorder()
    run_pipeline(Pipeline(raw), store=store, only="one", listener=recorder)
    assert ("cached", "one") in recorder.said
    assert ("started", "one") not in recorder.said
    outcome(second_run)
    assert not list(store.glob("*/.look-*"))


def test_many_runners_may_open_a_new_store_at_once(store: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom align.store.store import Store\nStore.open(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(store)]
    running = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    (store / ".align-store.json.1234").touch()
    (store / "align-store.json").unlink()
    Store.open(store)


# ---- away for a while -----------------------------------------------------------------------------------------------


def failing(times: int, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first calls fail as on a file system that is away."""
    left = [times]

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*arguments, **named)

    return call


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow one another quickly."""
    monkeypatch.setattr("align.store.retry.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("align.store.retry.LONGEST_PAUSE", 0.02)


PLACES = [
    ("align.store.leases", "write_sealed", errno.EIO), ("align.store.store", "output_digests", errno.ESTALE),
    ("align.store.store", "sync_folder", errno.ETIMEDOUT), ("align.store.claims", "_write_new", errno.ENOTCONN),
    ("align.runner.run_stage", "StageRun._copy_logs", errno.EHOSTDOWN),
    ("align.runner.run_stage", "StageRun._prepare_partial", errno.EHOSTUNREACH),
    ("align.runner.stage_process", "_result", errno.ESTALE),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "number"), PLACES, ids=[name for _, name, _ in PLACES])
def test_a_store_that_is_away_for_a_moment_is_waited_for(
    store: Path, monkeypatch: pytest.MonkeyPatch, hurried: None, module: str, name: str, number: int
) -> None:
    function = attrgetter(name)(importlib.import_module(module))
    monkeypatch.setattr(f"{module}.{name}", failing(3, number, function))
    recorder = Recorder()
    run = run_pipeline(Pipeline(toy.pipeline()), store=store, only="one", listener=recorder)
    assert run.ran == ["one"]
    monkeypatch.undo()
    assert not run.store.problems(run.artifacts["one"], thorough=True)
    assert run_pipeline(Pipeline(toy.pipeline()), store=store, only="one").ran == []


def test_unreachable_store_ends_the_run_and_it_resumes(
    refused: Refused, store: Path, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    raw = {**toy.pipeline(), "runtime": {"store": {"patience": 0.3}}}
    recorder = Recorder()
    with monkeypatch.context() as patched:
        patched.setattr("align.store.store.output_digests", failing(10**6, errno.ESTALE, lambda _: {}))
        refused(lambda: run_pipeline(Pipeline(raw), store=store, listener=recorder))
    assert len([text for label, text in recorder.said if label == "warning" and "does not answer" in text]) == 1
    again = Recorder()
    assert run_pipeline(Pipeline(raw), store=store, listener=again).ran == ["one", "two", "total"]
    assert ("started", "one") not in again.said  # what was made had only to be published


def test_errors_that_do_not_pass_are_not_waited_for(tmp_path: Path) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    began = time.monotonic()
    with pytest.raises(PermissionError):
        Retry(tmp_path, 60).call(refused)
    assert time.monotonic() - began < 30


def test_stage_that_lost_the_store_resumes_from_checkpoints(store: Path) -> None:
    recorder = Recorder()
    run = run_pipeline(Pipeline(toy.pipeline(one={"crash": "away"})), store=store, only="one", listener=recorder)
    assert run.metrics("one")["resumed_at"] == 2
    assert len(run.artifacts["one"].record["attempts"]) == 2
    assert [label for label, name in recorder.said if name == "one"] == ["started", "resumed"]
    assert any(label == "warning" and "Stale file handle" in text for label, text in recorder.said)


def test_a_stage_that_finds_the_store_away_every_time_fails(refused: Refused, store: Path) -> None:
    raw = toy.pipeline(one={"crash": "gone"})
    refused(lambda: run_pipeline(Pipeline(raw), store=store))
    (attempts,) = store.glob("number/*.partial/attempts.json")
    assert len(json.loads(attempts.read_text())["seconds"]) == 3, "then it gave up"


def test_a_store_whose_mount_is_away_is_not_begun_anew(refused: Refused, store: Path, hurried: None) -> None:
    raw = {**toy.pipeline(), "runtime": {"store": {"patience": 0.2}}}

    class Unmounts(Recorder):
        def stage_cached(self, node: Any, artifact: Any) -> None:
            store.rename(store.with_name("elsewhere"))
            store.mkdir()

    run_pipeline(Pipeline(raw), store=store, only="one")
    refused(lambda: run_pipeline(Pipeline(raw), store=store, listener=Unmounts()))
    assert list(store.iterdir()) == []


def test_which_errors_say_that_the_store_is_away() -> None:
    assert is_unreachable(OSError(errno.EIO, "Input/output error"))
    assert is_unreachable(OSError(errno.ETIMEDOUT, "Connection timed out", "/shared/store/x"))
    assert is_unreachable(RuntimeError("Error while serializing: I/O error: Stale file handle (os error 116)"))
    assert not is_unreachable(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))  # of a judge, say
    assert not is_unreachable(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_unreachable(ValueError("5"))


# ---- real file systems ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if result.returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Fill a file system with one file."""
    with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return disk / "filler"


def test_a_store_on_a_disk_that_is_full_loses_nothing(refused: Refused, small_disk: Path) -> None:
    store = small_disk / "store"
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    filler = fill(small_disk)
    refused(lambda: run_pipeline(Pipeline(toy.pipeline()), store=store))
    filler.unlink()
    run = run_pipeline(Pipeline(toy.pipeline()), store=store)
    assert run.ran == ["two", "total"]


def test_data_stage_on_a_full_disk_resumes_to_equal_rows(refused: Refused, small_disk: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": rng.randbytes(99).hex(), "completion": rng.randbytes(99).hex()} for _ in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.yaml").write_text("kind: instructions\nsources: [{type: files, paths: [rows.jsonl]}]\n")
    (tmp_path / "data.yaml").write_text("name: data\nstages: {data: {recipe: rows.yaml}}\n")
    store = small_disk / "store"
    refused(lambda: run_pipeline(Pipeline.load(tmp_path / "data.yaml"), store=store))
    assert Store.open(store).all() == []
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    for place in (store, tmp_path / "store"):
        assert run_pipeline(Pipeline.load(tmp_path / "data.yaml"), store=place).ran == ["data"]
    outputs = [Store.open(place).all()[0].record["outputs"] for place in (store, tmp_path / "store")]
    digests = [{name: file["sha256"] for name, file in files.items() if name.endswith(".parquet")} for files in outputs]
    assert digests[0] == digests[1] and len(digests[0]) == 3


def test_stage_whose_log_fills_the_disk_is_explained(small_disk: Path) -> None:
    store = small_disk / "store"
    noisy = Pipeline(toy.pipeline(one={"crash": "noise"}))
    plan(noisy, Store.open(store))
    filler = fill(small_disk)
    # Room for the stage's files, and not for the 100 kB that it prints.
    os.truncate(filler, filler.stat().st_size - 64 * 1024)
    with pytest.raises(StageFailed, match="no space left on the disk"):
        run_pipeline(noisy, store=store)
    filler.unlink()
    assert run_pipeline(noisy, store=store).ran == ["one", "two", "total"]


def test_lock_on_a_full_disk_is_still_renewed(small_disk: Path) -> None:
    opened = Store.open(small_disk / "store", lease=1.2)
    with opened.lock("sft", "0" * 64, lambda _: None) as hold:
        filler = fill(small_disk)
        before = (hold.claims.folder / str(hold.number)).read_bytes()
        wait_for(lambda: (hold.claims.folder / str(hold.number)).read_bytes() != before)
        filler.unlink()
    assert not opened.is_locked("sft", "0" * 64)


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A real mount, and the file that has it be away."""
    pytest.importorskip("mfusepy", exc_type=(ImportError, OSError), reason="no FUSE here: install mfusepy and libfuse3")
    folder, place, away = tmp_path / "server", tmp_path / "mount", tmp_path / "server.away"
    folder.mkdir()
    place.mkdir()
    command = [sys.executable, "-m", "tests.support.flaky_mount", str(folder), str(place)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not os.path.ismount(place):
        if process.poll() is not None or time.monotonic() > end:
            pytest.skip(f"no FUSE mounts here: {process.communicate()[1].decode()[-200:]}")
        time.sleep(0.05)
    yield place, away
    away.unlink(missing_ok=True)
    subprocess.run(["fusermount3", "-u", "-z", str(place)], check=True)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_lost_mount_costs_no_finished_work(
    flaky: tuple[Path, Path],
) -> None:
    place, away = flaky
    store, recorder = place / "store", Recorder()
    raw = {**toy.pipeline(one={"pause": 0.3, "steps": 8}), "runtime": {"store": {"patience": 60}}}

    class Outage(Recorder):
        def stage_event(self, node: Any, event: dict[str, Any]) -> None:
            super().stage_event(node, event)
            if event["event"] == "progress" and event["done"] == 3 and not self.before:
                self.before = True
                away.touch()
                threading.Timer(3.0, away.unlink).start()

        before = False

    recorder = Outage()
    run = run_pipeline(Pipeline(raw), store=store, listener=recorder)
    assert run.ran == ["one", "two", "total"]
    assert run.metrics("one")["resumed_at"] >= 2
    assert not any(run.store.problems(artifact, thorough=True) for artifact in run.artifacts.values())
    assert any(label == "warning" for label, _ in recorder.said)
    away.touch()
    short = {**toy.pipeline(one={"number": 9}), "runtime": {"store": {"patience": 1}}}
    with pytest.raises(StoreUnreachable, match="Stale file handle"):
        run_pipeline(Pipeline(short), store=store)
    away.unlink()
    assert run_pipeline(Pipeline(raw), store=store).ran == []


def test_unwritten_result_is_reported_by_the_exit_code(tmp_path: Path) -> None:
    from align.runner.stage_process import _result

    assert [_result(tmp_path, code)["status"] for code in (74, 120, 1, -9)] == ["unreachable"] * 2 + ["failed"] * 2
