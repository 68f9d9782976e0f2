"""One run in the studio's API: graph, curves, logs, warnings, and what stops and resumes it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from align import Pipeline
from align.errors import StageFailed
from align.runner.runner import run_pipeline
from align.store.store import Store
from align.studio import run_index
from tests.support import toy
from tests.support.runs import wait_for
from tests.support.studio.client import OWN_PAGE, open_client

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e"


@pytest.fixture(autouse=True)
def fresh_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the list at every request."""
    monkeypatch.setattr(run_index, "SECONDS_FRESH", 0.0)


def test_run_has_a_graph_with_costs_and_links(client: TestClient) -> None:
    run = client.get("/api/runs/toy").json()
    graph = run["graph"]
    assert [box["name"] for box in graph["boxes"]] == ["one", "two", "total"]
    assert {box["status"] for box in graph["boxes"]} == {"done"}
    assert len(graph["arrows"]) == 2, "total reads both numbers"
    stages = {stage["stage"]: stage for stage in run["stages"]}
    assert stages["total"]["inputs"] == ["one", "two"]
    assert stages["one"]["cost"]["tokens"] == "7"
    assert stages["one"]["has_curves"] and not stages["total"]["has_curves"]


def test_failed_stage_shows_its_message_and_log(client: TestClient) -> None:
    run = client.get("/api/runs/broken").json()
    boxes = {box["name"]: box["status"] for box in run["graph"]["boxes"]}
    assert boxes == {"one": "done", "two": "failed", "total": "pending"}
    log = client.get("/api/runs/broken/stages/two/log").json()
    assert "ValueError: a bug" in log["text"] and log["path"].endswith("log.txt")
    assert client.get("/api/runs/broken/stages/total/log").json() == {"path": "", "text": ""}


def test_curves_are_the_series_of_the_report(client: TestClient) -> None:
    curves = client.get("/api/runs/toy/stages/one/curves").json()
    assert curves["left_out"] == [] and curves["averaged"] == 1
    assert curves["panels"] == [{"title": "loss", "lines": [{"name": "loss", "x": [1, 2, 3], "y": [1, 0.5, 0.333333]}]}]
    assert client.get("/api/runs/toy/stages/total/curves").json()["panels"] == []


def test_settings_of_a_stage_have_its_record(client: TestClient) -> None:
    settings = client.get("/api/runs/toy/stages/one/settings").json()
    assert "number: 1" in settings["config"]
    assert ["number", "1", ""] in settings["metrics"]
    assert "Key" in dict(settings["facts"])
    waiting = client.get("/api/runs/broken/stages/total/settings").json()
    assert "first: one" in waiting["config"] and waiting["facts"] == []


@pytest.mark.parametrize("path", ["nope", "nope/stages/one/log", "toy/stages/nope/log", "toy/stages/nope/curves"])
def test_other_names_are_not_found(client: TestClient, path: str) -> None:
    answer = client.get(f"/api/runs/{path}")
    assert answer.status_code == 404 and "nope" in answer.json()["error"]


def test_a_close_name_is_suggested(client: TestClient) -> None:
    assert "Did you mean 'toy'?" in client.get("/api/runs/toi").json()["error"]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StageFailed):
        run_pipeline(Pipeline(toy.pipeline(two={"crash": "bug"})), store=store)
    (partial,) = store.glob("number/*.partial")
    (partial / "log.txt").write_text(HOSTILE + "\udcff\n", errors="surrogateescape")
    with (partial / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "warning", "message": HOSTILE}) + "\n")
        file.write(json.dumps({"event": "metrics", "step": 1, HOSTILE: 1.0, "bad": float("nan")}) + "\n")
        file.write(json.dumps({"event": "metrics", "step": 2, HOSTILE: 2.0, "bad": float("inf")}) + "\n")
    client = open_client(store)
    run = client.get("/api/runs/toy")
    assert run.headers["content-type"] == "application/json"
    assert run.json()["stages"][1]["warnings"] == [HOSTILE]
    assert client.get("/api/runs/toy/stages/two/log").json()["text"] == HOSTILE + "\ufffd\n"
    assert HOSTILE in [panel["title"] for panel in client.get("/api/runs/toy/stages/two/curves").json()["panels"]]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """A store with a run of a slow stage that was killed after two of its steps."""
    monkeypatch.chdir(Path(__file__).parents[2])

    def make() -> Path:
        store = tmp_path / "store"
        with pytest.raises(StageFailed):
            run_pipeline(Pipeline(toy.pipeline(one={"crash": "kill", "steps": 400, "pause": 0.05})), store=store)
        return store

    return make


def stage_states(client: TestClient, run: str = "toy") -> dict[str, str]:
    return {stage["stage"]: stage["state"] for stage in client.get(f"/api/runs/{run}").json()["stages"]}


def test_a_run_is_resumed_followed_and_stopped(stopped: Callable[[], Path]) -> None:
    store = stopped()
    client = open_client(store)
    assert stage_states(client)["one"] == "stopped"
    answer = client.post("/api/runs/toy/resume", headers=OWN_PAGE, json={})
    assert answer.status_code == 200, answer.text
    process = answer.json()["process"]
    # The killed attempt has left the progress of two steps.
    wait_for(lambda: (shown := progress_of(client)) is not None and (shown["share"] or 0) > 0.02, 60)
    shown = progress_of(client)
    assert shown is not None and 0 < shown["share"] < 1 and "/400 steps" in shown["text"]
    assert os.getsid(process) == process, "Ctrl-C of the studio does not reach it"
    again = client.post("/api/runs/toy/resume", headers=OWN_PAGE, json={})
    assert again.status_code == 400 and "runs already" in again.json()["error"]
    stop = client.post("/api/runs/toy/stop", headers=OWN_PAGE, json={})
    assert stop.json() == {"jobs": [], "processes": [process]}
    wait_for(lambda: stage_states(client)["one"] == "stopped", 60)
    # The command prints its last words after it has let go of the stage.
    wait_for(lambda: "kept" in console_of(client), 60)
    assert "resumes" in console_of(client)
    assert client.post("/api/runs/toy/stop", headers=OWN_PAGE, json={}).json() == {"jobs": [], "processes": []}


def console_of(client: TestClient) -> str:
    return str(client.get("/api/runs/toy/console").json()["text"])


def progress_of(client: TestClient) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = client.get("/api/runs/toy").json()["stages"][0]["progress"]
    return progress


def test_resume_refuses_what_would_begin_anew(
    toy_store: Path, tmp_path: Path, stopped: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = open_client(toy_store).post("/api/runs/toy/resume", headers=OWN_PAGE, json={})
    assert finished.status_code == 400 and "nothing to resume" in finished.json()["error"]
    store = stopped()
    entry = Store.open(store).runs()["toy"]
    entry["stages"]["one"]["key"] = "f" * 64
    from align.store.leases import write_run

    write_run(store, "toy", entry["stages"], entry["pipeline"])
    changed = open_client(store).post("/api/runs/toy/resume", headers=OWN_PAGE, json={})
    assert changed.status_code == 400 and "the stage 'one' has another key now" in changed.json()["error"]


def test_a_studio_that_only_reads_refuses_actions(toy_store: Path) -> None:
    client = open_client(toy_store, read_only=True)
    assert client.get("/api/studio").json()["is_writable"] is False
    for action in ("stop", "resume"):
        answer = client.post(f"/api/runs/toy/{action}", headers=OWN_PAGE, json={})
        assert answer.status_code == 403 and "--read-only" in answer.json()["error"]
        assert client.get(f"/api/runs/toy/{action}").status_code == 405, "a link cannot act"


def test_stop_names_a_stage_that_the_run_lacks(client: TestClient) -> None:
    answer = client.post("/api/runs/toy/stop", headers=OWN_PAGE, json={"stages": ["nope"]})
    assert answer.status_code == 404
    answer = client.post("/api/runs/toy/stop", headers=OWN_PAGE, json={"stages": "one"})
    assert answer.status_code == 422 and answer.json()["error"].startswith("stages: ")


def test_events_are_read_again_only_after_a_change(toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.studio import run_detail

    client = open_client(toy_store)
    first = client.get("/api/runs/toy").json()
    monkeypatch.setattr(run_detail, "read_events", lambda folder: pytest.fail("it was read again"))
    started = time.perf_counter()
    assert client.get("/api/runs/toy").json() == first
    assert time.perf_counter() - started < 1


def test_report_page_is_written_and_served(tmp_path: Path, toy_store: Path) -> None:
    store = tmp_path / "store"
    run_pipeline(Pipeline(toy.pipeline()), store=store)
    client = open_client(store)
    assert client.get("/api/runs/toy").json()["page"] == ""
    answer = client.post("/api/runs/toy/report", headers=OWN_PAGE, json={})
    address = answer.json()["page"]
    assert address.startswith("/reports/toy/report.html?ticket=")
    page = client.get(address)
    assert "<h1>toy</h1>" in page.text
    assert re.search("script-src 'sha256-[^']+'", page.headers["content-security-policy"])
    read_only = open_client(toy_store, read_only=True)
    assert read_only.post("/api/runs/toy/report", headers=OWN_PAGE, json={}).status_code == 403
