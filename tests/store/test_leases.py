"""Runs keep ``gc`` from what they use, and from everything where it is not known what they use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.cli.main import main
from align.runner import runner
from align.runner.runner import run_pipeline
from align.store import leases, locks
from align.store.claims import FolderClaims
from align.store.garbage import DELETED, delete_garbage, find_garbage
from align.store.leases import LEASES, USES
from align.store.locks import Lock
from align.store.store import Store
from tests.support import toy
from tests.support.refusals import Refused
from tests.support.runs import start, wait_for


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def gc(store: Path) -> int:
    return main(["gc", "--delete", "--store", str(store)])


DAMAGES: dict[str, bytes | None] = {
    "truncated": None, "empty": b"", "a list": b"[]", "an object": b"{}", "no text": b"\xff\xfe",
    "deep": b"[" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_about_a_run_keeps_everything(
    store: Path, damage: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    about = store / "runs" / "toy.json"
    about.write_bytes(about.read_bytes()[:100] if damage is None else damage)
    assert gc(store) == 2
    err = capsys.readouterr().err
    assert f"{about}: damaged: it" in err and "nothing is deleted" in err
    assert len(Store.open(store).all()) == 3
    run_pipeline(Pipeline(toy.pipeline()), store=store)  # the remedy
    assert gc(store) == 0
    assert len(Store.open(store).all()) == 3


def test_a_folder_in_the_place_of_a_file_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=store)
    for path in (store / "runs" / "toy.json", run.artifacts["one"].path / "record.json"):
        path.unlink()
        path.mkdir()
    assert gc(store) == 2
    assert "toy.json: damaged: it cannot be read (Is a directory)" in capsys.readouterr().err
    assert main(["list", "--store", str(store)]) == 0
    assert "record.json: damaged: it cannot be read (Is a directory)" in capsys.readouterr().err


def test_a_flipped_key_in_the_file_about_a_run_keeps_everything(store: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=store)
    about, key = store / "runs" / "toy.json", run.artifacts["one"].record["key"]
    about.write_text(about.read_text().replace(key, key[:-1] + ("0" if key[-1] != "0" else "1")))
    assert gc(store) == 2
    assert len(Store.open(store).all()) == 3


def test_gc_keeps_artifacts_of_active_run_of_same_name(store: Path) -> None:
    raw = toy.pipeline(two={"pause": 0.5, "steps": 6})
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: outcome.update(run=run_pipeline(Pipeline(raw), store=store)))
    thread.start()
    wait_for(lambda: list(store.glob("number/*.partial/checkpoints/step-0")) and len(Store.open(store).all()) == 1, 60)
    run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=store, only="one")
    assert gc(store) == 0
    assert main(["gc", "--store", str(store)]) == 0
    thread.join()
    assert outcome["run"].metrics("total") == {"total": 3}
    assert not list((store / LEASES).iterdir()), "a run that has ended leaves no lease"
    first = outcome["run"].artifacts["one"].path
    assert first.exists()
    assert gc(store) == 0
    assert not first.exists(), "now only the other run is known by the name"


def test_a_run_that_was_killed_keeps_nothing(store: Path) -> None:
    raw = toy.pipeline(two={"pause": 5})
    process = start(raw, store)
    wait_for(lambda: list(store.glob("number/*.partial")) and len(Store.open(store).all()) == 1, 60)
    process.kill()
    process.wait()
    assert list((store / LEASES).iterdir())
    run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=store, only="one")
    before = time.monotonic()
    assert gc(store) == 0
    assert time.monotonic() - before < 5, "this machine can tell"
    assert not list((store / LEASES).iterdir())
    assert [artifact.record["config"]["number"] for artifact in Store.open(store).all()] == [9]


def test_next_run_deletes_leases_of_killed_runs(store: Path) -> None:
    opened = Store.open(store)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claims = FolderClaims(store / LEASES / "killed-0123456789ab")
    claims.prepare()
    claim = {"token": "x", "pid": dead.pid, "machine": locks._machine(), "started": "1", "lease": 120.0}
    claims.create(1, json.dumps(claim).encode().ljust(1024))
    far = far_run(store, 120)
    with opened.use("toy", {}, {}):
        assert not claims.folder.exists() and far.exists()


def far_run(store: Path, seconds: float) -> Path:
    """The lease of a run on another machine that has fallen silent, on the first number of the toy."""
    opened = Store.open(store, lease=seconds)
    folder = store / LEASES / "toy-0123456789ab"
    claim = {
        "token": "x",
        "pid": 7,
        "host": "far",
        "machine": "elsewhere",
        "started": "1",
        "lease": seconds,
        "beats": 3,
    }
    claims = FolderClaims(folder)
    claims.prepare()
    claims.create(1, json.dumps(claim).encode().ljust(1024))
    key = Pipeline(toy.pipeline()).nodes["one"].key
    from align.store.json_files import write_sealed

    write_sealed(folder / USES, {"run": "toy", "stages": {"one": {"kind": "number", "key": key}}})
    assert opened.leases.uses()[0].run == "toy"
    return folder


def test_the_lease_of_a_machine_that_died_ends(store: Path) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=store, only="one")
    folder = far_run(store, 3.0)
    assert find_garbage(Store.open(store)) == []
    assert len(delete_garbage(Store.open(store, lease=3))) == 1
    assert not folder.exists()


def test_a_lease_that_cannot_be_read_keeps_everything(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    (store / "runs" / "toy.json").unlink()
    folder = far_run(store, 600.0)
    (folder / USES).write_text("[]")
    assert gc(store) == 2
    assert f"{folder / USES}: damaged: it holds a list" in capsys.readouterr().err
    assert len(Store.open(store).all()) == 1
    shutil.rmtree(folder)
    assert gc(store) == 0
    assert Store.open(store).all() == []


def test_no_run_begins_while_gc_deletes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    (store / "runs" / "toy.json").unlink()
    opened, order = Store.open(store), []
    delete = Store.delete

    def slowly(self: Store, folder: Path) -> bool:
        thread.start()
        time.sleep(1)
        order.append("deleted")
        return delete(self, folder)

    def run() -> None:
        run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
        order.append("made")

    thread = threading.Thread(target=run)
    monkeypatch.setattr(Store, "delete", slowly)
    assert list(delete_garbage(opened).values()) == [DELETED]
    thread.join()
    assert order == ["deleted", "made"]
    assert len(opened.all()) == 1


def test_only_is_refused_after_gc_deleted_its_input(
    refused: Refused, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    (store / "runs" / "toy.json").unlink()
    prepare = runner.prepare_run

    def prepare_slowly(*arguments: Any) -> Any:
        ready = prepare(*arguments)
        assert gc(store) == 0
        return ready

    monkeypatch.setattr(runner, "prepare_run", prepare_slowly)
    refused(lambda: run_pipeline(Pipeline(toy.pipeline(total={"scale": 2.0})), store=store, only="total"))


def test_gc_on_full_disk_names_a_remedy(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    (store / "runs" / "toy.json").unlink()

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("align.store.claims._write_new", refuse)
    assert gc(store) == 2
    assert f"Delete {store / 'cache'}, which only saves time, and run again" in capsys.readouterr().err


def test_a_lease_that_could_not_be_written_holds_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    opened = Store.open(store)
    with monkeypatch.context() as patched:
        patched.setattr(leases, "write_sealed", refuse)
        with pytest.raises(OSError, match="No space"), opened.use("toy", {}, {}):
            pass
    assert not list((store / LEASES).iterdir())
    assert delete_garbage(opened) == {}


def test_a_run_that_waits_until_gc_is_done_says_so(store: Path) -> None:
    opened, output = Store.open(store), []
    opened.retry.log = lambda text: (output.append(text), hold.release())
    hold = Lock(store / "locks" / "gc").acquire(lambda _: None, opened.retry)
    with opened.use("toy", {}, {}):
        pass
    assert len(output) == 1 and "waits until `align gc`" in output[0]


def test_gc_drops_caches_of_run_folders(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS shows a folder that was listed a moment ago as it was then, so without the run that has begun since."""
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    (store / "runs" / "toy.json").unlink()
    opened, hidden = Store.open(store), store.with_name("hidden")

    def show(folder: Path) -> None:
        for path in (hidden / folder.name).iterdir():
            path.rename(folder / path.name)

    with opened.use("toy", Pipeline(toy.pipeline()).references, {}):
        for name in ("runs", LEASES):
            (hidden / name).mkdir(parents=True)
            for path in (store / name).iterdir():
                path.rename(hidden / name / path.name)
        monkeypatch.setattr("align.store.store.drop_nfs_cache", show)
        assert len(find_garbage(opened)) == 1
        assert delete_garbage(opened) == {}
    assert len(opened.all()) == 1


def test_a_damaged_claim_is_held_by_somebody_unknown(tmp_path: Path) -> None:
    for content in (b"[]", b'{"pid": "x"}', b'{"released": 1}', b'{"lease": null}', b"\xff", b""):
        claims = FolderClaims(tmp_path / content.hex())
        claims.prepare()
        claims.create(1, content)
        lock = Lock(claims)
        assert lock.is_held() and lock.holder() is None
