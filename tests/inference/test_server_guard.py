"""The guard as an ASGI app: who gets through to the routes behind it, and who does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from align.inference import server_guard
from align.inference.server_guard import Guard, key_of_environment, new_key, write_key

KEY = new_key()
GOOD = {"host": "127.0.0.1:8000", "authorization": f"Bearer {KEY}"}
ROUTES = (
    "/v1/completions",
    "/collective_rpc",
    "/server_info",
    "/health",
    "/metrics",
    "/",
    "/docs",
    "/ping",
    "/no/such",
)


class Behind:
    """What the guard protects: notes what comes through."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"through"})


async def unread() -> Any:
    """A refused request's body is never asked for: it may have no end."""
    raise AssertionError("the body was read")


def ask(guard: Guard, headers: list[tuple[str, str]], kind: str = "http", **scope: Any) -> list[dict[str, Any]]:
    """What is sent in answer to a request."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    asyncio.run(guard({"type": kind, "headers": encoded, "method": "POST", "path": "/", **scope}, unread, send))
    return sent


def status(guard: Guard, headers: dict[str, str] | list[tuple[str, str]], **scope: Any) -> int:
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    return int(ask(guard, pairs, **scope)[0]["status"])


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def guard(behind: Behind) -> Guard:
    return Guard(behind, KEY, ["localhost", "node1"])


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "PUT"])
def test_no_route_and_no_method_answers_without_the_key(guard: Guard, behind: Behind, path: str, method: str) -> None:
    """vLLM's own key leaves OPTIONS alone, and every route outside of /v1."""
    assert status(guard, {"host": "localhost"}, path=path, method=method) == 401
    assert behind.scopes == []
    assert status(guard, GOOD, path=path, method=method) == 200
    assert len(behind.scopes) == 1


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "{key}", "Basic {key}", "Bearer {key}0", "Bearer {shortened}", "Bearer é"]
)
def test_a_wrong_key(guard: Guard, behind: Behind, value: str) -> None:
    header = value.format(key=KEY, shortened=KEY[:-1])
    assert status(guard, GOOD | {"authorization": header}) == 401
    assert behind.scopes == []


def test_a_key_given_twice(guard: Guard) -> None:
    assert status(guard, [*GOOD.items(), ("authorization", "Bearer other")]) == 401


@pytest.mark.parametrize("header", ["origin", "Origin", "sec-fetch-site", "Sec-Fetch-Mode"])
def test_a_browser_is_refused_even_with_the_key(guard: Guard, behind: Behind, header: str) -> None:
    assert status(guard, GOOD | {header: "null"}) == 403
    assert behind.scopes == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("10.1.2.3:8000", 200),
        ("node1:8000", 200), ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
        ("", 403),
    ],
)  # fmt: skip
def test_names_that_a_page_could_point_here_are_refused(guard: Guard, host: str, expected: int) -> None:
    assert status(guard, GOOD | {"host": host}) == expected


def test_a_request_without_a_host_or_with_two(guard: Guard) -> None:
    assert status(guard, {"authorization": GOOD["authorization"]}) == 403
    assert status(guard, [*GOOD.items(), ("host", "localhost")]) == 403


def test_websockets_are_closed_and_lifespan_passes(guard: Guard, behind: Behind) -> None:
    (closed,) = ask(guard, [("host", "localhost")], kind="websocket")
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
    assert behind.scopes == []
    assert ask(guard, [], kind="lifespan") == []
    assert [scope["type"] for scope in behind.scopes] == ["lifespan"]


def test_key_comes_from_a_private_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.key"
    write_key(KEY, file)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_key(KEY, file)
    monkeypatch.setenv(server_guard.KEY, "0123456789abcdef")
    assert key_of_environment() == "0123456789abcdef"
    monkeypatch.setenv(server_guard.KEY_FILE, str(file))
    assert key_of_environment() == KEY
    assert status(Guard(Behind()), GOOD) == 200


@pytest.mark.parametrize("key", ["", "short", "with a space in the middle", "with-ümlaut-in-the-middle"])
def test_no_server_starts_with_a_key_that_guards_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server_guard.KEY_FILE, raising=False)
    monkeypatch.setenv(server_guard.KEY, key)
    with pytest.raises(RuntimeError, match="ALIGN_SERVER_KEY: the server's key cannot be used"):
        Guard(Behind())


def test_further_names_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server_guard.KEY, KEY)
    monkeypatch.delenv(server_guard.KEY_FILE, raising=False)
    monkeypatch.setenv(server_guard.HOSTS, "GPU7, proxy.example")
    guard = Guard(Behind())
    assert status(guard, GOOD | {"host": "gpu7:8000"}) == 200
    assert status(guard, GOOD | {"host": "proxy.example"}) == 200
    assert status(guard, GOOD | {"host": "other.example"}) == 403
