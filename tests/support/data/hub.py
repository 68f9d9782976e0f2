"""A Hugging Face Hub in this process: it answers HfApi over HTTP and records what it was sent.

Test modules that import the fixtures ``hub`` and ``online`` name them in ``__all__``.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_secretsecretsecret"
CACHED = "hf_fromalogincache"


class Hub(ThreadingHTTPServer):
    """A Hub that records all requests; ``files`` are in the repository already."""

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
            regular = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
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


def operations(hub: Hub) -> dict[str, dict[str, bytes | None]]:
    """Return the operations of the only commit: kind → file name → bytes of what is added."""
    (lines,) = hub.commits
    by_kind: dict[str, dict[str, bytes | None]] = {"file": {}, "deletedFile": {}, "header": {}}
    for line in lines:
        content = line["value"].get("content")
        by_kind.setdefault(line["key"], {})[line["value"].get("path", "")] = (
            base64.b64decode(content) if content is not None else None
        )
    return by_kind
