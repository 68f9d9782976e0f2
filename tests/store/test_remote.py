"""A store whose finished stages lie in a bucket, too, against a real server that speaks S3."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import StageFailed
from align.runner.open_store import open_store
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.store import remote as remote_module
from align.store.claims import BucketClaims
from align.store.json_files import seal
from align.store.locks import Lease, Lock
from align.store.object_store import Bucket
from align.store.retry import Retry
from align.store.store import Store
from tests.support import toy
from tests.support.records import record_of
from tests.support.refusals import Refused
from tests.support.runs import Recorder, published
from tests.support.s3_server import SECRET, Server


def raw(address: str | None, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    settings = {"remote": address, "patience": 1, "lease": 2}
    return {**toy.pipeline(**changes), "runtime": {"store": settings}}


def at(folder: Path, address: str) -> Store:
    """A store with its remote, opened as by another machine."""
    store = Store.open(folder, lease=2, retry_seconds=1)
    store.connect(address)
    return store


def test_what_one_machine_has_finished_another_fetches(tmp_path: Path, address: str) -> None:
    first, second = Recorder(), Recorder()
    new_run = run_pipeline(Pipeline(raw(address)), store=tmp_path / "a", listener=first)
    steps = plan(Pipeline(raw(address)), open_store(Pipeline(raw(address)), tmp_path / "b"))
    assert [step.action for step in steps] == ["fetch"] * 3
    assert address in steps[0].why
    run = run_pipeline(Pipeline(raw(address)), store=tmp_path / "b", listener=second)
    assert run.ran == []
    assert len([text for label, text in second.said if label == "transfer" and "fetching" in text]) == 3
    assert len([text for label, text in first.said if label == "transfer" and "uploading" in text]) == 3
    for name, artifact in run.artifacts.items():
        assert artifact.record == new_run.artifacts[name].record
        assert (artifact.path / "number.txt").read_text() == (new_run.artifacts[name].path / "number.txt").read_text()
        assert (artifact.path / "log.txt").read_text() == (new_run.artifacts[name].path / "log.txt").read_text()
        assert not run.store.problems(artifact, thorough=True)
    third = Recorder()
    assert run_pipeline(Pipeline(raw(address)), store=tmp_path / "b", listener=third).ran == []
    assert not [text for label, text in third.said if label == "transfer"]
    assert list((tmp_path / "b").glob("*/*.fetched")) == []


def test_only_fetches_what_it_needs(tmp_path: Path, address: str) -> None:
    run_pipeline(Pipeline(raw(address)), store=tmp_path / "a")
    run = run_pipeline(Pipeline(raw(address, total={"scale": 3.0})), store=tmp_path / "b", only="total")
    assert run.ran == ["total"]
    assert (run.artifacts["total"].path / "number.txt").read_text() == "9"
    only_first = run_pipeline(Pipeline(raw(address)), store=tmp_path / "c", only="one")
    assert only_first.ran == []
    assert len(only_first.store.all()) == 1


def test_an_address_may_stand_wherever_a_store_may(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Pipeline({**toy.pipeline(), "runtime": {"store": address}}).config.runtime.store.remote == address
    opened = open_store(None, address)
    assert (opened.root, opened.remote and opened.remote.address) == (Path("store"), address)
    monkeypatch.setenv("ALIGN_STORE", address)
    opened = open_store(None, tmp_path / "mine")
    assert (opened.root, opened.remote and opened.remote.address) == (tmp_path / "mine", address)
    assert open_store(opened.remote and None, opened) is opened


@pytest.mark.parametrize(
    "wrong",
    [
        "s3://key:hunter2@bucket/p",
        "s3://bucket/p?X-Amz-Signature=hunter2",
        "ftp://bucket/hunter2",
        "s3:///hunter2",
    ],
)
def test_an_address_that_will_not_do_is_refused_and_not_repeated(refused: Refused, tmp_path: Path, wrong: str) -> None:
    for inputs in (wrong, {"remote": wrong}):
        refused(Pipeline, {**toy.pipeline(), "runtime": {"store": inputs}})
    refused(open_store, None, wrong)


def test_nothing_secret_is_written(tmp_path: Path, address: str) -> None:
    run_pipeline(Pipeline(raw(address)), store=tmp_path / "a")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file
    bucket = Bucket(address)
    assert not any(SECRET.encode() in (bucket.get(path) or b"") for path in bucket.sizes(""))


# ---- cut off --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from align.store.object_store import Bucket
from tests.store.test_remote import at
upload, done = Bucket.upload, []
def killed(self, path, file):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    upload(self, path, file)
    done.append(path)
Bucket.upload = killed
store = at(Path(sys.argv[1]), sys.argv[2])
store.remote.push(store.all()[0])
"""


def big(store: Store) -> Any:
    """An artifact of several files."""
    output = store.partial("number", "a" * 64) / "output"
    (output / "model").mkdir(parents=True)
    for index in range(4):
        (output / "model" / f"{index}.bin").write_bytes(bytes([index]) * (1 << 20))
    record = record_of(stage="one")
    with store.lock("number", "a" * 64, lambda _: None) as hold:
        return store.publish(output, record, hold)


def test_killed_upload_is_not_visible_and_continues(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = at(tmp_path / "a", address)
    artifact = big(store)
    command = [sys.executable, "-c", KILLED, str(store.root), address]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}).returncode == -signal.SIGKILL
    second_store = at(tmp_path / "b", address)
    assert len(second_store.remote.bucket.sizes("number")) == 2
    assert second_store.remote.find("number", "a" * 64) is None
    assert second_store.fetch("number", "a" * 64) is None
    upload, uploaded = Bucket.upload, []

    def counted(self: Bucket, path: str, file: Path) -> None:
        uploaded.append(file.name)
        upload(self, path, file)

    monkeypatch.setattr(Bucket, "upload", counted)
    assert store.remote.push(artifact)
    assert uploaded == ["2.bin", "3.bin"]
    fetched = second_store.fetch("number", "a" * 64)
    assert fetched is not None and fetched.record == artifact.record


def test_interrupted_fetch_is_not_visible_and_continues(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = at(tmp_path / "a", address)
    assert store.remote.push(big(store))
    monkeypatch.setattr(remote_module, "CHUNK", 1 << 18)
    get_range, request = Bucket.get_range, []

    def cut_off(self: Bucket, path: str, start: int, length: int) -> bytes | None:
        request.append((Path(path).name, start))
        if len(request) == 7:
            raise KeyboardInterrupt
        return get_range(self, path, start, length)

    monkeypatch.setattr(Bucket, "get_range", cut_off)
    second_store = at(tmp_path / "b", address)
    with pytest.raises(KeyboardInterrupt):
        second_store.fetch("number", "a" * 64)
    assert second_store.find("number", "a" * 64) is None
    assert second_store.all() == []
    fetched = at(tmp_path / "b", address).fetch("number", "a" * 64)
    assert request[6:8] == [("1.bin", 2 << 18)] * 2
    assert len(request) == 4 * 4 + 1
    assert not second_store.problems(fetched, thorough=True)


# ---- what is not as it should be ------------------------------------------------------------------------------------


def test_tampered_object_is_refused_and_rebuilt(refused: Refused, tmp_path: Path, address: str) -> None:
    run_pipeline(Pipeline(raw(address)), store=tmp_path / "a")
    bucket = Bucket(address)
    (path,) = [path for path in bucket.sizes("sum") if path.endswith("number.txt")]
    bucket.put(path, b"4")
    refused(lambda: run_pipeline(Pipeline(raw(address)), store=tmp_path / "b"))
    assert list((tmp_path / "b").glob("sum/*/record.json")) == []
    run = run_pipeline(Pipeline(raw(address)), store=tmp_path / "b", rebuild=("total",))
    assert run.ran == ["total"]
    again = run_pipeline(Pipeline(raw(address)), store=tmp_path / "c")
    assert again.ran == []
    assert again.artifacts["total"].record["created"] == run.artifacts["total"].record["created"]
    bucket.delete(path)
    refused(lambda: run_pipeline(Pipeline(raw(address)), store=tmp_path / "d"))


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"../../evil": {"bytes": 1, "sha256": "0", "mtime_ns": 1}}},
        {"outputs": {"/etc/evil": {"bytes": 1, "sha256": "0", "mtime_ns": 1}}},
        {"outputs": {"x": {"bytes": -1, "sha256": "0", "mtime_ns": 1}}},
        {"key": "b" * 64}, {"kind": "sft"}, {"makes": "Malware"}, {"outputs": None},
    ],
)  # fmt: skip
def test_a_record_that_leads_elsewhere_is_refused(
    refused: Refused, tmp_path: Path, address: str, change: dict[str, Any]
) -> None:
    store = at(tmp_path / "a", address)
    record = published(store).record
    store.remote.bucket.put("number/" + "a" * 12 + "/record.json", json.dumps(seal({**record, **change})).encode())
    refused(lambda: at(tmp_path / "b", address).fetch("number", "a" * 64))
    assert not list(tmp_path.rglob("evil"))


def test_damaged_remote_record_harms_only_its_stage(refused: Refused, tmp_path: Path, address: str) -> None:
    run = run_pipeline(Pipeline(raw(address)), store=tmp_path / "a")
    bucket, key = Bucket(address), run.artifacts["total"].record["key"]
    bucket.put(f"sum/{key[:12]}/record.json", b"[]")
    intact, damaged = at(tmp_path / "b", address).remote.survey()
    assert len(intact) == 2 and [error.finding for error in damaged] == ["holds a list instead of an object"]
    steps = plan(Pipeline(raw(address)), open_store(Pipeline(raw(address)), tmp_path / "b"))
    assert [step.action for step in steps] == ["fetch", "fetch", "damaged"]
    refused(lambda: run_pipeline(Pipeline(raw(address)), store=tmp_path / "b"))
    assert run_pipeline(Pipeline(raw(address)), store=tmp_path / "b", rebuild=("total",)).ran == ["total"]
    assert run_pipeline(Pipeline(raw(address)), store=tmp_path / "c").ran == []


def test_a_damaged_artifact_is_not_uploaded(refused: Refused, tmp_path: Path, address: str) -> None:
    store = at(tmp_path / "a", address)
    artifact = published(store)
    (artifact.path / "number.txt").write_text("2")
    refused(store.remote.push, artifact)
    assert store.remote.find("number", "a" * 64) is None


def test_push_uploads_intact_artifacts_and_names_damaged(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.cli.main import main

    stages = {**toy.pipeline()["stages"], "three": {"stage": "tests.support.toy:NUMBER", "number": 3}}
    run = run_pipeline(Pipeline({"name": "toy", "stages": stages}), store=tmp_path / "store")
    (run.artifacts["one"].path / "number.txt").write_text("55")
    (run.artifacts["two"].path / "record.json").write_text("")
    Bucket(address).put(f"sum/{run.artifacts['total'].path.name}/record.json", b"[]")
    monkeypatch.chdir(tmp_path)
    assert main(["push", "--store", address, "--json"]) == 2
    captured = capsys.readouterr()
    outcomes = {load["key"]: load["outcome"] for load in json.loads(captured.out)}
    nodes = Pipeline({"name": "toy", "stages": stages}).nodes
    assert [outcomes.get(nodes[name].key) for name in stages] == ["damaged", None, "damaged", "uploaded"]
    for text in (
        "number.txt has 2 bytes",
        "record.json: damaged: it is empty",
        "record.json: damaged: it holds a list",
    ):
        assert text in captured.err


def test_of_two_machines_that_made_the_same_one_publishes(tmp_path: Path, address: str) -> None:
    first, second = at(tmp_path / "a", address), at(tmp_path / "b", address)
    first_published, second_published = published(first), published(second)
    second_published.record["created"] = "2026-01-02"
    assert first.remote.push(first_published)
    assert not second.remote.push(second_published)
    third = at(tmp_path / "c", address).fetch("number", "a" * 64)
    assert third is not None and third.record["created"] == "2026-01-01"


# ---- locks ----------------------------------------------------------------------------------------------------------


def test_bucket_lock_has_one_holder_and_a_lease(address: str) -> None:
    bucket, patience = Bucket(address), Retry(address, 5)
    claims = BucketClaims(bucket, "locks/sft-0123")
    hold = Lock(claims, Lease(1.0, 0.2)).acquire(lambda _: None, patience)
    waiter = Lock(claims, Lease(1.0, 0.2))
    assert [waiter.try_acquire() for _ in range(3)] == [None] * 3
    hold.confirm()
    hold._ended.set()  # it falls silent, without giving it back
    hold._thread.join()
    claim = json.loads(claims.read(1))
    claims.write(1, json.dumps({**claim, "machine": "elsewhere"}).encode())
    acquired = waiter.acquire(lambda _: None, patience)
    assert (acquired.number, acquired.after_silence) == (2, True)
    with pytest.raises(StageFailed, match="while this run was silent"):
        hold.confirm()
    acquired.release()
    assert claims.numbers() == [2]
    with pytest.raises(FileNotFoundError):
        claims.write(1, b"1")


def test_two_machines_make_each_stage_once(tmp_path: Path, address: str) -> None:
    from tests.support.runs import outcome, start

    both = [start(raw(address, one={"pause": 0.2}), tmp_path / name, name) for name in ("here", "there")]
    results = [outcome(process) for process in both]
    assert sorted(results[0]["ran"] + results[1]["ran"]) == ["one", "total", "two"]
    records = [{a.stage: a.record for a in Store.open(tmp_path / name).all()} for name in ("here", "there")]
    assert records[0] == records[1]


# ---- away -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow one another quickly."""
    monkeypatch.setattr("align.store.object_store.TRIES", 0)
    monkeypatch.setattr("align.store.retry.FIRST_PAUSE", 0.05)
    monkeypatch.setattr("align.store.retry.LONGEST_PAUSE", 0.05)


def test_remote_away_at_start_stops_the_run(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StageFailed, match=r"could not be reached for 1 s .*--set runtime\.store=FOLDER"):
        run_pipeline(Pipeline(raw(address)), store=tmp_path / "a")
    assert Store.open(tmp_path / "a").all() == []
    assert run_pipeline(Pipeline(raw(None)), store=tmp_path / "a").ran == ["one", "two", "total"]


def test_next_run_uploads_after_remote_was_away(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(remote_module, "SECONDS_ONCE_AWAY", 0.1)
    opened = at(tmp_path / "a", address)
    upload = Bucket.upload

    def gone(self: Bucket, path: str, file: Path) -> None:
        self._opened = None
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        upload(self, path, file)

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "upload", gone)
        run = run_pipeline(Pipeline(raw(address)), store=opened, listener=recorder)
    assert run.ran == ["one", "two", "total"]
    assert [text for label, text in recorder.said if "is only in" in str(text) and "next run uploads it" in str(text)]
    monkeypatch.undo()
    assert at(tmp_path / "b", address).remote.all() == []
    assert run_pipeline(Pipeline(raw(address)), store=tmp_path / "a").ran == []
    assert len(at(tmp_path / "b", address).remote.all()) == 3


def test_credentials_that_expire_cost_a_run_only_its_uploads(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    recorder = Recorder()
    opened = at(tmp_path / "a", address)
    lock = remote_module.Remote.lock

    @contextlib.contextmanager
    def lock_and_expire(self: remote_module.Remote, *arguments: Any) -> Iterator[Any]:
        with lock(self, *arguments) as hold:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
            self.bucket._opened = None
            yield hold

    with monkeypatch.context() as patched:
        patched.setattr(remote_module.Remote, "lock", lock_and_expire)
        run = run_pipeline(Pipeline(raw(address)), store=opened, listener=recorder)
    assert run.ran == ["one", "two", "total"]
    said = [str(text) for label, text in recorder.said]
    assert [text for text in said if "access was refused" in text and "is only in" not in text]
    assert [text for text in said if "is only in" in text and "next run uploads it" in text]


def test_wrong_credentials_and_none_are_said(
    refused: Refused, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    refused(lambda: run_pipeline(Pipeline(raw(address)), store=tmp_path / "a"))


def test_missing_bucket_is_refused_before_the_run(refused: Refused, tmp_path: Path, address: str) -> None:
    refused(lambda: run_pipeline(Pipeline(raw("s3://nowhere/x")), store=tmp_path / "a"))
    assert Store.open(tmp_path / "a").all() == []


@pytest.mark.slow
def test_a_server_that_restarts_is_waited_for(tmp_path: Path, address: str, server: Server) -> None:
    import threading

    store = at(tmp_path / "a", address)
    store.retry.seconds = 120
    artifact = published(store)
    server.stop()
    again = threading.Timer(1.0, server.start)
    again.start()
    assert store.remote.push(artifact)
    again.join()
    assert at(tmp_path / "b", address).fetch("number", "a" * 64) is not None


# ---- commands -------------------------------------------------------------------------------------------------------


def test_what_is_where_is_listed_fetched_on_use_and_pushed(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.cli.main import main

    monkeypatch.chdir(tmp_path)
    artifact = published(Store.open(Path("store")))
    assert main(["push", "--store", "store"]) == 2
    assert "the store has no bucket" in capsys.readouterr().err
    assert main(["list", "--store", address]) == 0
    assert " here " in capsys.readouterr().out
    assert main(["push", "aaaa", "--store", address]) == 0
    assert capsys.readouterr().out.startswith("uploaded   number/aaaaaaaaaaaa")
    assert main(["push", "--store", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["outcome"] == "there"
    monkeypatch.setenv("ALIGN_STORE", address)
    assert main(["list", "--json"]) == 0
    assert [load["where"] for load in json.loads(capsys.readouterr().out)] == ["both"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["list"]) == 0
    assert " bucket " in capsys.readouterr().out
    assert main(["show", "aaaa", "--verify"]) == 0
    assert "all digests agree" in capsys.readouterr().out
    assert Store.open(Path("store")).find("number", "a" * 64).record == artifact.record
    assert main(["show", "bbbb"]) == 2
    assert main(["gc", "--delete"]) == 0
    assert Bucket(address).get("number/aaaaaaaaaaaa/record.json") is not None
