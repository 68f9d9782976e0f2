"""A Hugging Face Hub on this machine to read from: repositories of commits, for the Hub's real clients.

A process that is started with :func:`environment` and test modules that use the fixture ``online_hub`` read from it.
``tests/support/data/hub.py`` is the one to write to.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


@dataclass
class Repository:
    """Commits, and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, for each commit."""
    references: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files, to which ``branch`` then points; return it."""
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
        sha = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.references[branch] = sha
        return sha


class HubServer(ThreadingHTTPServer):
    """The server; ``repositories`` by their path: ``models/owner/name`` or ``datasets/owner/name``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def repository(self, path: str) -> Repository:
        return self.repositories.setdefault(path, Repository())

    def push_folder(self, path: str, folder: Path, branch: str = "main") -> str:
        """Commit every file of a folder; return the commit."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        return self.repository(path).commit(files, branch)


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, code: str, message: str) -> None:
        self.answer_json({"error": message}, 404, X_Error_Code=code, X_Error_Message=message)

    def find(self, path: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files, or answer that there are none."""
        repository = self.server.repositories.get(path)
        if repository is None:
            self.refuse("RepoNotFound", "Repository not found")
            return None
        commit = repository.references.get(revision, revision)
        if commit not in repository.commits:
            self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            self.describe(parts[1:])
        elif "resolve" in parts:
            self.send_file(parts)
        else:
            self.refuse("EntryNotFound", self.path)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.requests.append(f"POST {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if "paths-info" not in parts:
            return self.refuse("EntryNotFound", self.path)
        found = self.find("/".join(parts[1:4]), parts[5])
        if found is None:
            return None
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        entries = [entry for entry in _entries(found[1], True) if entry["path"] in wanted]
        return self.answer_json(entries)

    def describe(self, parts: list[str]) -> None:
        path, rest = "/".join(parts[:3]), parts[3:]
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.find(path, revision)
        if found is None:
            return None
        commit, files = found
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            recursive = "recursive=true" in self.path.lower()
            below = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
            if folder and not below:
                return self.refuse("EntryNotFound", folder)
            return self.answer_json(_entries(below, recursive, folder))
        return self.answer_json(
            {
                "id": "/".join(parts[1:3]),
                "sha": commit,
                "private": False,
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def send_file(self, parts: list[str]) -> None:
        place = parts.index("resolve")
        repository = "/".join(parts[:place]) if parts[0] == "datasets" else "models/" + "/".join(parts[:place])
        found = self.find(repository, parts[place + 1])
        if found is None:
            return None
        commit, files = found
        data = files.get("/".join(parts[place + 2 :]))
        if data is None:
            message = "Entry not found"
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message=message, X_Repo_Commit=commit)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or len(data) - 1), len(data) - 1)
            part = data[int(start) : last + 1]
            return self.answer(part, 206, Content_Range=f"bytes {start}-{last}/{len(data)}", **headers)
        return self.answer(data, **headers)


def _entries(files: dict[str, bytes], recursive: bool, folder: str = "") -> list[dict[str, Any]]:
    """Return the tree's entries of files, and of the folders they are in."""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        below = name.removeprefix(f"{folder}/") if folder else name
        first, _, rest = below.partition("/")
        if rest:
            path = f"{folder}/{first}" if folder else first
            entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        if not rest or recursive:
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return list(entries.values())


def environment(server: HubServer, cache: Path) -> dict[str, str]:
    """Return the variables with which a process reads from the server, into a cache of its own."""
    return {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def online_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server, from which this process and those that it starts read, into a cache of their own."""
    from huggingface_hub import constants

    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    cache = tmp_path / "hub-cache"
    for name, value in environment(server, cache).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    forget_hub()
    yield server
    server.shutdown()
    server.server_close()
    forget_hub()


def forget_hub() -> None:
    """Empty what this process remembers of the Hub."""
    from align.config import hub_commits

    hub_commits._current_commit.cache_clear()
    hub_commits._is_answering.cache_clear()
