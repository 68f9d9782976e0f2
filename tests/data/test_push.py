"""Pushing to a Hub that this process plays: what HfApi really sends over HTTP is looked at, not a mock of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from align.data.card import write_card
from align.data.push import prepare, push, stale_files
from tests.support.data.hub import TOKEN, Hub, hub, online, operations
from tests.support.data.sample_build import row, write_build
from tests.support.refusals import Refused

__all__ = ["hub", "online"]  # fixtures


@pytest.fixture
def build(tmp_path: Path) -> Path:
    dropped = [(row("a private question", "x"), "personal data", {"found": "me@example.org"})]
    folder = write_build(
        tmp_path / "build", [row("a", "b"), row("c", "d")], [row("e", "f")], dropped, {"first": "MIT"}, files=2
    )
    (folder / "preview.html").write_text("<p>a private question</p>")
    (folder / "record.json").write_text("{}")
    write_card(
        folder, {"kind": "instructions", "sources": []}, json.loads((folder / "ledger.json").read_text()), "demo"
    )
    return folder


def test_rows_card_and_ledger_go_and_no_dropped_text(build: Path, hub: Hub, online: None) -> None:
    upload = prepare(build, "me/set", private=True)
    done = push(upload, HfApi(endpoint=hub.address))
    added = operations(hub)["file"]
    assert sorted(added) == sorted(part.name for part in upload.parts)
    assert sorted(added) == [
        "README.md", "ledger.json", "test-00000-of-00001.parquet", "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]  # fmt: skip
    for name in added:
        if name != "ledger.json":
            assert added[name] == (build / name).read_bytes()
        assert b"private question" not in (added[name] or b"")
        assert b"me@example.org" not in (added[name] or b"")
    ledger = json.loads(added["ledger.json"] or b"")
    assert ledger["steps"][1]["dropped"] == {"personal data": 1} and ledger["rows_out"] == 3
    assert hub.created[0]["type"] == "dataset"
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert done["url"].endswith("c" * 40) and done["deleted"] == []


def test_who_asks_for_nothing_gets_the_owners_default(build: Path, hub: Hub, online: None) -> None:
    push(prepare(build, "me/set"), HfApi(endpoint=hub.address))
    assert not {"visibility", "private"} & set(hub.created[0])


def test_everything_goes_when_asked_for(build: Path, hub: Hub, online: None) -> None:
    push(prepare(build, "me/set", everything=True), HfApi(endpoint=hub.address))
    added = operations(hub)["file"]
    assert {"dropped-00000-of-00001.parquet", "preview.html"} <= set(added) and "record.json" not in added
    assert added["ledger.json"] == (build / "ledger.json").read_bytes()


def test_push_deletes_shards_of_earlier_push(build: Path, hub: Hub, online: None) -> None:
    hub.files = [
        "train-00000-of-00003.parquet",
        "train-00000-of-00002.parquet",
        "preview.html",
        "notes.md",
        ".gitattributes",
    ]
    done = push(prepare(build, "me/set"), HfApi(endpoint=hub.address))
    assert done["deleted"] == ["preview.html", "train-00000-of-00003.parquet"]
    assert set(operations(hub)["deletedFile"]) == {"preview.html", "train-00000-of-00003.parquet"}


def test_a_branch_is_made_where_one_is_named(build: Path, hub: Hub, online: None) -> None:
    push(prepare(build, "me/set", revision="v2"), HfApi(endpoint=hub.address))
    assert ("POST", "/api/datasets/me/set/branch/v2") in hub.asked
    assert ("POST", "/api/datasets/me/set/commit/v2") in hub.asked


def test_private_rows_do_not_go_to_a_public_repository(refused: Refused, build: Path, hub: Hub, online: None) -> None:
    hub.private = False
    refused(lambda: push(prepare(build, "me/set", private=True), HfApi(endpoint=hub.address)))
    assert hub.commits == []


@pytest.mark.parametrize(
    "status",
    [401, 403, 400],
)
def test_a_refusal_says_what_to_do_and_never_the_token(
    refused: Refused, status: int, build: Path, hub: Hub, online: None
) -> None:
    hub.refuse = status
    refused(lambda: push(prepare(build, "me/set"), HfApi(endpoint=hub.address)))


def test_a_hub_that_is_away_is_a_failure_not_a_mistake(refused: Refused, build: Path, hub: Hub, online: None) -> None:
    address = hub.address
    hub.shutdown()
    hub.server_close()
    refused(lambda: push(prepare(build, "me/set"), HfApi(endpoint=address)))


@pytest.mark.parametrize("name", ["set", "me/", "me/se t", "../up", "me/a/b", "me/a..b"])
def test_names_the_hub_does_not_take_are_refused_here(refused: Refused, name: str, build: Path) -> None:
    refused(prepare, build, name)


def test_a_folder_that_is_no_build_is_refused(refused: Refused, build: Path, tmp_path: Path) -> None:
    refused(prepare, tmp_path, "me/set")
    (build / "README.md").unlink()
    refused(prepare, build, "me/set")


def test_stale_is_only_what_a_push_puts_there() -> None:
    there = ["data/train-00000-of-00001.parquet", "train.parquet", "train-x.txt", "README.md"]
    assert stale_files(there, ["README.md"]) == ["train.parquet"]
