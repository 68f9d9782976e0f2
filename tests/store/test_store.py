from pathlib import Path

import pytest

from align import Pipeline
from align.errors import UserError
from align.runner.runner import run_pipeline
from align.store.garbage import find_garbage
from align.store.store import Store
from tests.support import toy


def test_resolve_by_prefix(tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    key = run.artifacts["total"].record["key"]
    assert run.store.resolve(key[:10]).path == run.artifacts["total"].path
    assert run.store.resolve(f"sum/{key[:6]}").path == run.artifacts["total"].path
    with pytest.raises(UserError, match="no artifact's key starts with 'zzz'"):
        run.store.resolve("zzz")
    with pytest.raises(UserError, match="fits 3 artifacts"):
        run.store.resolve("")


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


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run = run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
    (run.artifacts["one"].path / "record.json").write_text("{")
    with pytest.raises(
        UserError, match=r"record\.json: damaged: it is not JSON .*`--rebuild one` makes the stage again"
    ):
        run_pipeline(Pipeline(toy.pipeline()), store=tmp_path)
