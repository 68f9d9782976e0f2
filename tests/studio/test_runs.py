"""The runs of a store as the studio's API gives them: states, damage, hostile names, a live stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from align import Pipeline
from align.runner.runner import run_pipeline
from align.store.leases import write_run
from align.store.store import Store
from align.studio import run_index
from align.studio.run_index import RunIndex
from tests.support import toy
from tests.support.studio.client import open_client
from tests.support.studio.server import running_studio

HOSTILE = "<script>alert(1)</script>\u202e"


def by_name(answer: Any) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {run["name"]: run for run in answer.json()["runs"]}


def test_list_has_the_states_of_all_runs(client: TestClient) -> None:
    runs = by_name(client.get("/api/runs"))
    assert list(runs) == ["broken", "toy"], "the last run comes first"
    assert runs["toy"]["counts"] == {"done": 3}
    assert runs["broken"]["counts"] == {"done": 1, "failed": 1, "not begun": 1}
    states = {stage["stage"]: stage for stage in runs["broken"]["stages"]}
    assert states["two"]["what"] == "ValueError: a bug"
    assert states["total"]["state"] == "not begun"
    assert runs["toy"]["page"] == ""


def test_damaged_and_hostile_records_do_not_hide_runs(tmp_path: Path) -> None:
    store = tmp_path / "store"
    client = open_client(store)
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    stages = {HOSTILE: {"kind": "number", "key": "a" * 64}}
    write_run(store, "hostile", stages, {"stages": {"report": {"title": HOSTILE}}})
    write_run(store, "outside", {"one": {"kind": "../..", "key": "a" * 64}}, {})
    (store / "runs" / "half.json").write_text('{"name": "half"')
    answer = client.get("/api/runs")
    assert by_name(answer)["toy"]["counts"] == {"done": 3}
    hostile = by_name(answer)["hostile"]
    assert hostile["title"] == hostile["stages"][0]["stage"] == HOSTILE
    assert [Path(text.partition(":")[0]).name for text in answer.json()["damaged"]] == ["half.json", "outside.json"]


def test_index_reads_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_index, "SECONDS_FRESH", 0.0)
    store = Store.open(tmp_path / "store")
    index = RunIndex(store)
    assert index.read().runs == {}
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    first = index.read()
    assert [status.state for status in first.states["toy"]] == ["done"] * 3
    calls: list[str] = []
    monkeypatch.setattr(run_index, "stage_status", lambda outline, stage, *more: calls.append(stage))
    assert index.read().states == first.states
    assert calls == [], "records that are the same are not read again"
    monkeypatch.undo()
    monkeypatch.setattr(run_index, "SECONDS_FRESH", 0.0)
    kind, key = first.runs["toy"].outline.stages["total"]
    (store.folder(kind, key) / "record.json").unlink()
    assert [status.state for status in index.read().states["toy"]] == ["done", "done", "not begun"]
    (store.root / "runs" / "toy.json").unlink()
    assert index.read().runs == {}


def test_records_of_a_large_store_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_index, "SECONDS_FRESH", 0.0)
    store = Store.open(tmp_path / "store")
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    index = RunIndex(store)
    monkeypatch.setattr(run_index, "SECONDS_FOR_RECORDS", -1.0)
    assert [(status.state, status.detail) for status in index.read().states["toy"]] == [("done", "")] * 3
    _, states = index.find("toy") or pytest.fail("the run is there")
    assert all(status.detail.startswith("20") for status in states), "one run is read completely"
    index = RunIndex(store)
    monkeypatch.setattr(run_index, "SECONDS_FOR_RECORDS", 60.0)
    assert all(status.detail.startswith("20") for status in index.read().states["toy"])
    kind, key = index.read().runs["toy"].outline.stages["one"]
    (store.folder(kind, key) / "record.json").write_text("{}")
    assert [status.state for status in index.read().states["toy"]] == ["damaged", "done", "done"]


def test_stream_sends_each_change_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with running_studio(store) as studio, studio.client() as client, client.stream("GET", "/api/runs-stream") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        lines = answer.iter_lines()

        def next_state() -> Any:
            for line in lines:
                if line.startswith("data: "):
                    return json.loads(line.removeprefix("data: "))
            raise AssertionError("the stream ended")

        assert next_state()["runs"] == []
        write_run(store, "later", {"one": {"kind": "number", "key": "b" * 64}}, {})
        state = next_state()
        assert [run["name"] for run in state["runs"]] == ["later"]
        assert state["runs"][0]["counts"] == {"not begun": 1}
