"""Pushing to a Hub that this process plays: what HfApi really sends over HTTP is looked at, not a mock of it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from align.data.card import write_card
from align.data.push import prepare, push, stale
from align.errors import StageFailed, UserError
from tests.support.data.by_hand import row, write_build

TOKEN = "hf_secretsecretsecret"
CACHED = "hf_fromalogincache"


class Hub(ThreadingHTTPServer):
    """Remembers what it was asked; ``files`` are in the repository already."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: list[str] = []
        self.private = True
        self.refuse: int | None = None
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.commits: list[list[dict[str, Any]]] = []
        self.created: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self) -> bytes:
        self.server.asked.append((self.command, self.path.split("?")[0]))
        self.server.tokens.add(self.headers.get("Authorization"))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self.note()
        if self.server.refuse:
            return self.answer({"error": f"refused, you sent {TOKEN} or {CACHED}"}, self.server.refuse)
        info = {"id": "me/set", "private": self.server.private, "sha": "0" * 40}
        files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
        if "/tree/" in self.path:
            return self.answer(files)
        siblings = [{"rfilename": name} for name in self.server.files]
        return self.answer({**info, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.note()
        if self.server.refuse:
            return self.answer({"error": f"refused, you sent {TOKEN} or {CACHED}"}, self.server.refuse)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/datasets/me/set"})
        if "/branch/" in self.path:
            return self.answer({})
        if self.path.endswith("/api/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self.answer({"files": regular})
        if "/commit/" in self.path:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            return self.answer(
                {"commitUrl": f"{self.server.address}/datasets/me/set/commit/{'c' * 40}", "commitOid": "c" * 40}
            )
        return self.answer({"error": self.path}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


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


def operations(hub: Hub) -> dict[str, dict[str, bytes | None]]:
    """Of the only commit: names by what is done, with the bytes of what is added."""
    (lines,) = hub.commits
    found: dict[str, dict[str, bytes | None]] = {"file": {}, "deletedFile": {}, "header": {}}
    for line in lines:
        content = line["value"].get("content")
        found.setdefault(line["key"], {})[line["value"].get("path", "")] = (
            base64.b64decode(content) if content is not None else None
        )
    return found


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


def test_shards_of_an_earlier_push_are_deleted_in_the_same_commit(build: Path, hub: Hub, online: None) -> None:
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


def test_private_rows_do_not_go_to_a_public_repository(build: Path, hub: Hub, online: None) -> None:
    hub.private = False
    with pytest.raises(UserError, match="is there already, and public"):
        push(prepare(build, "me/set", private=True), HfApi(endpoint=hub.address))
    assert hub.commits == []


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(401, UserError, "HF_TOKEN"), (403, UserError, "HF_TOKEN"), (400, UserError, "refuses")],
)
def test_a_refusal_says_what_to_do_and_never_the_token(
    status: int, kind: type[Exception], said: str, build: Path, hub: Hub, online: None
) -> None:
    hub.refuse = status
    with pytest.raises(kind, match=said) as caught:
        push(prepare(build, "me/set"), HfApi(endpoint=hub.address))
    assert TOKEN not in str(caught.value) and CACHED not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_hub_that_is_away_is_a_failure_not_a_mistake(build: Path, hub: Hub, online: None) -> None:
    address = hub.address
    hub.shutdown()
    hub.server_close()
    with pytest.raises(StageFailed, match="cannot be reached"):
        push(prepare(build, "me/set"), HfApi(endpoint=address))


@pytest.mark.parametrize("name", ["set", "me/", "me/se t", "../up", "me/a/b", "me/a..b"])
def test_names_the_hub_does_not_take_are_refused_here(name: str, build: Path) -> None:
    with pytest.raises(UserError, match="no name of a Hub dataset"):
        prepare(build, name)


def test_a_folder_that_is_no_build_is_refused(build: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ledger\.json"):
        prepare(tmp_path, "me/set")
    (build / "README.md").unlink()
    with pytest.raises(UserError, match="without a card"):
        prepare(build, "me/set")


def test_stale_is_only_what_a_push_puts_there() -> None:
    there = ["data/train-00000-of-00001.parquet", "train.parquet", "train-x.txt", "README.md"]
    assert stale(there, ["README.md"]) == ["train.parquet"]
