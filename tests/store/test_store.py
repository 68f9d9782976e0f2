from pathlib import Path

import pytest

from align import Pipeline
from align.cli.main import main
from align.runner.runner import run_pipeline
from align.store.garbage import DELETED, delete_garbage, find_garbage
from align.store.store import Store
from tests.support import toy
from tests.support.refusals import Refused
from tests.support.runs import published


def test_resolve_by_prefix(refused: Refused, tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    key = run.artifacts["total"].record["key"]
    assert run.store.resolve(key[:10]).path == run.artifacts["total"].path
    assert run.store.resolve(f"sum/{key[:6]}").path == run.artifacts["total"].path
    refused(run.store.resolve, "zzz")
    refused(run.store.resolve, "")


def test_gc_keeps_what_a_named_run_reaches_and_its_inputs(tmp_path: Path) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=tmp_path)  # same name: the first 'one' is unreached
    store = Store.open(tmp_path)
    garbage = find_garbage(store)
    assert sorted(path.parent.name for path in garbage) == ["number", "sum"]
    # a run that names only the sum still keeps what the sum was made from
    store.remember_run("toy", {"total": store.runs()["toy"]["stages"]["total"]}, {})
    assert find_garbage(store) == garbage
    # A download that broke off stays where a run needs it.
    one = store.runs()["toy"]["stages"]["total"]
    needed, unneeded = store.fetched(one["kind"], one["key"]), store.fetched("number", "0" * 64)
    for draft in (needed, unneeded):
        draft.mkdir()
    garbage = find_garbage(store)
    assert unneeded in garbage and needed not in garbage
    needed.rmdir()
    assert all(store.delete(path) for path in garbage)
    assert len(store.all()) == 3
    assert run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=tmp_path).ran == []


def test_gc_leaves_a_folder_that_a_run_is_using(tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    artifact = run.artifacts["one"]
    with run.store.lock("number", artifact.record["key"], lambda holder: None):
        assert not run.store.delete(artifact.path)
    assert artifact.path.exists()


def test_a_damaged_record_is_named(refused: Refused, tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    (run.artifacts["one"].path / "record.json").write_text("{")
    refused(lambda: run_pipeline(Pipeline(toy.pipeline()), store=tmp_path))


def test_gc_deletes_a_link_and_not_its_target(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run = run_pipeline(Pipeline(toy.pipeline()), store=store)
    linked, target = run.artifacts["one"].path, tmp_path / "elsewhere"
    linked.rename(target)
    linked.symlink_to(target)
    (store / "sum" / "dangling").symlink_to(tmp_path / "gone")
    (store / "runs" / "toy.json").unlink()
    states = delete_garbage(Store.open(store))
    assert len(states) == 4 and set(states.values()) == {DELETED}
    assert not linked.is_symlink() and (target / "record.json").is_file()
    assert Store.open(store).folders() == []


def test_gc_deletes_nothing_below_a_linked_kind(tmp_path: Path) -> None:
    run_pipeline(Pipeline(toy.pipeline()), store=tmp_path / "other")
    store = Store.open(tmp_path / "store")
    (store.root / "sum").symlink_to(tmp_path / "other" / "sum")
    assert len(store.all()) == 1 and delete_garbage(store) == {}


def test_gc_deletes_the_rest_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    (tmp_path / "runs" / "toy.json").unlink()
    bad, delete = run.artifacts["one"].path, Store.delete

    def delete_others(self: Store, folder: Path) -> bool:
        if folder == bad:
            raise PermissionError(13, "Permission denied", str(folder / "x"))
        return delete(self, folder)

    monkeypatch.setattr(Store, "delete", delete_others)
    assert main(["gc", "--delete", "--store", str(tmp_path)]) == 1
    assert f"cannot be deleted (Permission denied: {bad / 'x'})" in capsys.readouterr().out
    assert [artifact.path for artifact in Store.open(tmp_path).all()] == [bad]


def test_partial_of_published_stage_is_deleted(tmp_path: Path) -> None:
    """A runner may be killed after it has published a stage and before it has deleted the partial."""
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path, only="one")
    record = run.artifacts["one"].record
    partial = run.store.partial(record["kind"], record["key"])
    (partial / "checkpoints" / "step-1").mkdir(parents=True)
    assert find_garbage(run.store) == [partial]
    run_pipeline(Pipeline(toy.pipeline()), store=tmp_path, only="one")
    assert not partial.exists()


def test_partial_of_killed_rebuild_is_kept(tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path, only="one")
    record = run.artifacts["one"].record
    partial = run.store.partial(record["kind"], record["key"])
    (partial / "output").mkdir(parents=True)
    run_pipeline(Pipeline(toy.pipeline()), store=tmp_path, only="one")
    assert partial.exists() and find_garbage(run.store) == []


def test_verify_reports_files_outside_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = published(Store.open(tmp_path))
    arguments = ["show", artifact.key[:8], "--store", str(tmp_path), "--verify"]
    assert main(arguments) == 0
    (artifact.path / "model").mkdir()
    (artifact.path / "model" / "generation_config.json").symlink_to("gone")
    assert main(arguments) == 1
    assert f"{artifact.path / 'model' / 'generation_config.json'} is not in its record" in capsys.readouterr().out
