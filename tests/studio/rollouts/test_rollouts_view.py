"""The addresses of the view of rollouts: stages of runs, hostile names, and the state of a running stage."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from align.store.artifacts import CHECKPOINTS
from align.store.rollout_writer import RolloutFiles
from align.store.rollouts import make_table
from align.store.store import Store
from align.studio.app import create_app
from align.studio.context import StudioContext
from align.studio.rollouts import parquet_reader
from tests.support.records import put_record
from tests.support.stored_rollouts import write_rollouts

KEY = "0123456789abcdef" * 4
HOSTILE = ["..", "%2e%2e", "..%2f..%2fetc", "a/../../b", "ppo%00", "'; DROP TABLE x; --", "<b>", "ppo'", "."]


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "update": 1 + index // 2,
            "round": 0,
            "index": index % 2,
            "group": 0,
            "prompt_id": f"p{index}",
            "prompt": [{"role": "user", "content": "<img src=x onerror=alert(1)>"}],
            "response": f"</script><script>alert({index})</script>",
            "score": float(index),
            "tokens": 3,
        }
        for index in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "store")
    stages = {"ppo": {"kind": "ppo", "key": KEY}, "sft": {"kind": "sft", "key": KEY}}
    store.remember_run("smoke", stages, {"stages": {}})
    return store


@pytest.fixture
def client(store: Store) -> TestClient:
    app = create_app(StudioContext(store), "secret")
    return TestClient(app, base_url="http://127.0.0.1", headers={"authorization": "Bearer secret"})


def write(folder: Path, count: int = 6) -> None:
    """Write rows as a running stage does, or for a finished stage without a record."""
    files = RolloutFiles(folder.parent, 10**9, {"num_epochs": 2, "num_mini_batches": 4}, print)
    files.write(make_table(rows(count)), folder.name)
    if folder.parent.name != CHECKPOINTS:
        (folder.parent / f"{folder.name}.json").unlink()


def test_finished_and_running_stages_are_listed_and_read(store: Store, client: TestClient) -> None:
    assert client.get("/api/rollouts").json() == {"runs": []}
    assert client.get("/api/rollouts/smoke/ppo/rollouts").status_code == 404
    write(store.partial("ppo", KEY) / "checkpoints" / "rollouts", 2)
    stage = {"stage": "ppo", "kind": "ppo", "folders": ["rollouts"], "running": True}
    assert client.get("/api/rollouts").json() == {"runs": [{"run": "smoke", "stages": [stage]}]}
    assert client.get("/api/rollouts/smoke/ppo/rollouts").json()["total"] == 2
    # The stage finishes: its folder is renamed, and the same address reads the new one.
    folder = store.folder("ppo", KEY)
    write(folder / "rollouts")
    write(folder / "validations", 3)
    page = client.get("/api/rollouts/smoke/ppo/rollouts", params={"sort": "score", "limit": 2}).json()
    assert (page["total"], [row["score"] for row in page["rows"]]) == (6, [5.0, 4.0])
    assert client.get("/api/rollouts").json()["runs"][0]["stages"][0] == {
        "stage": "ppo",
        "kind": "ppo",
        "folders": ["rollouts", "validations"],
        "running": False,
    }
    assert client.get("/api/rollouts/smoke/ppo/validations").json()["total"] == 3


def test_every_address_answers(store: Store, client: TestClient) -> None:
    write(store.folder("ppo", KEY) / "rollouts")
    base = "/api/rollouts/smoke/ppo/rollouts"
    assert client.get(f"{base}/facets").json()["rows"] == 6
    assert [point["rows"] for point in client.get(f"{base}/means", params={"parts": ["a", "b"]}).json()["points"]] == [
        2
    ] * 3
    prompt = client.get(f"{base}/prompt", params={"prompt_id": "p3", "updates": "2,3", "base": "first"}).json()
    assert prompt["answers"][0]["response"] == "</script><script>alert(3)</script>"
    row = client.get(f"{base}/row", params={"id": "2--0-0-1"}).json()
    assert row["prompt"] == [{"role": "user", "content": "<img src=x onerror=alert(1)>"}]
    for response in (client.get(base), client.get(f"{base}/row", params={"id": "2--0-0-1"})):
        assert response.headers["content-type"] == "application/json"
    assert client.get(f"{base}/row", params={"id": "9--0-0-1"}).status_code == 404
    assert client.get(f"{base}/prompt", params={"prompt_id": "no"}).status_code == 404


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(store: Store, client: TestClient, name: str) -> None:
    write(store.folder("ppo", KEY) / "rollouts")
    for address in (f"{name}/ppo/rollouts", f"smoke/{name}/rollouts", f"smoke/ppo/{name}"):
        assert client.get(f"/api/rollouts/{address}").status_code in (400, 404, 422), address


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "1000000"},
        {"limit": "0"},
        {"offset": "-1"},
        {"min_score": "nan"},
        {"max_kl": "inf"},
        {"first_update": "1; DROP TABLE x"},
        {"sort": "score; --"},
        {"sort": '"update"'},
        {"response_words": "x" * 201},
        {"finished": "maybe"},
        {"columns": "*"},
        {"files": "/etc/passwd"},
        {"part": "x" * 501},
    ],
)
def test_values_outside_their_range_are_refused(store: Store, client: TestClient, query: dict[str, str]) -> None:
    write(store.folder("ppo", KEY) / "rollouts")
    response = client.get("/api/rollouts/smoke/ppo/rollouts", params=query)
    assert response.status_code == 422
    assert next(iter(query)) in response.json()["error"]


def test_folder_that_leads_out_of_the_store_is_refused(store: Store, client: TestClient, tmp_path: Path) -> None:
    write(tmp_path / "secret" / "rollouts")
    store.folder("ppo", KEY).parent.mkdir()
    os.symlink(tmp_path / "secret", store.folder("ppo", KEY))
    response = client.get("/api/rollouts/smoke/ppo/rollouts")
    assert response.status_code == 404
    assert "alert" not in response.text


def test_curves_lead_from_a_step_to_its_update(store: Store, client: TestClient) -> None:
    folder = store.partial("ppo", KEY) / "checkpoints" / "rollouts"
    write(folder, 2)
    for stage, steps in (("ppo", 8), ("sft", 1)):
        assert client.get(f"/api/runs/smoke/stages/{stage}/curves").json()["steps_per_update"] == steps
    # The curves need no rollouts.
    next(folder.glob("*.parquet")).write_bytes(b"garbage")
    assert client.get("/api/runs/smoke/stages/ppo/curves").json()["steps_per_update"] == 1


def damage(path: Path, other: Path, how: str) -> None:
    """Put something else at ``other``, which may be the place of a file."""
    content = bytearray(path.read_bytes())
    other.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(other)
    elif how == "folder":
        other.mkdir()
    elif how == "link":
        copy = path.with_suffix(".copy")
        copy.write_bytes(content)
        other.symlink_to(copy)
    elif how == "garbage":
        other.write_bytes(b"garbage")
    elif how == "other run":
        write_rollouts(make_table(rows(2)), other, {})
    elif how == "flipped bit":
        content[len(content) // 2] ^= 1
        other.write_bytes(content)


IRREGULAR = ("pipe", "folder", "link")


@pytest.mark.parametrize("how", [*IRREGULAR, "garbage", "other run", "flipped bit", "missing"])
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("place", ["listed", "another"])
def test_other_file_than_listed_is_named(
    store: Store, client: TestClient, how: str, is_finished: bool, place: str
) -> None:
    folder = store.folder("ppo", KEY) if is_finished else store.partial("ppo", KEY) / CHECKPOINTS
    write(folder / "rollouts")
    if is_finished:
        put_record(folder)
    (path,) = (folder / "rollouts").glob("*.parquet")
    addresses = [f"/api/rollouts/smoke/ppo/rollouts{rest}" for rest in ("", "/facets", "/means", "/row?id=1--0-0-0")]
    before = [client.get(address) for address in addresses]
    assert [answer.status_code for answer in before] == [200] * 4
    other = path if place == "listed" else path.with_name("000009-000009-01234567.parquet")
    damage(path, other, how)
    for address, answer in zip(addresses, before, strict=True):
        after = client.get(address)
        if place == "another" and (how == "missing" or (not is_finished and how not in IRREGULAR)):
            assert after.json() == answer.json()  # what the manifest does not list is not read
        else:
            assert 400 <= after.status_code < 500
            assert other.name in after.text


def test_long_query_is_ended_and_frees_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.setattr(parquet_reader, "SECONDS", 0.2)
    reader = parquet_reader.ParquetReader(tmp_path)
    for _ in range(parquet_reader.MAX_QUERIES + 1):
        with pytest.raises(duckdb.InterruptException):
            reader.rows("SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b", [])
    assert reader.rows("SELECT 1 AS one", []) == [{"one": 1}]
    reader.close()
