"""Requests that the studio refuses: without the token, from another page, for another host, out of the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from align.store.leases import write_run
from align.studio import runs_view, security
from align.studio.security import MAX_BODY
from tests.support.studio.client import ADDRESS, OWN_PAGE, TOKEN, open_client

FOREIGN = "http://evil.example"


@pytest.fixture
def stranger(toy_store: Path) -> TestClient:
    """A client without the token."""
    return open_client(toy_store, has_token=False)


@pytest.mark.parametrize(
    "path", ["/", "/api/runs", "/static/app.js", "/static/shared/page.css", "/reports/toy/report.html"]
)
def test_every_address_needs_the_token(stranger: TestClient, path: str) -> None:
    for answer in (stranger.get(path), stranger.get(path, headers={"authorization": "Bearer wrong"})):
        assert answer.status_code == 401
        assert "Open the address that `align studio` printed" in answer.text
    stranger.cookies.set("align-studio", TOKEN + "x")
    assert stranger.get(path).status_code == 401


def test_first_visit_moves_the_token_into_a_cookie(stranger: TestClient) -> None:
    answer = stranger.get(f"/?token={TOKEN}&a=1", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?a=1"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"align-studio={TOKEN};")
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert stranger.get("/").status_code == 200
    assert stranger.get("/?token=wrong", follow_redirects=False).status_code == 401


def test_token_never_redirects_to_another_host(stranger: TestClient) -> None:
    answer = stranger.get(f"{ADDRESS}//evil.example/?token={TOKEN}", follow_redirects=False)
    assert answer.headers["location"] == "/evil.example/"


def test_cookies_of_other_programs_do_not_hide_the_token(stranger: TestClient) -> None:
    cookie = f'other={{"a": "b,c"}}; @bad; align-studio={TOKEN}'
    assert stranger.get("/api/runs", headers={"cookie": cookie}).status_code == 200


def test_a_program_sends_the_token_as_a_bearer(stranger: TestClient) -> None:
    assert stranger.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8010", "127.0.0.1.evil.example", "127.0.0.1:8010@evil.example", "", "127.0.0.2"],
)
def test_foreign_host_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 403
    assert "host name is not served" in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:8010", "localhost:9000", "LOCALHOST", "[::1]:8010"])
def test_local_host_names_are_served(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": FOREIGN},
        {"origin": "null"},  # a sandboxed page
        {"origin": "http://127.0.0.1:9999"},  # another program of this machine
        {"origin": "https://127.0.0.1:8010"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},  # another port
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    ],
)
def test_requests_of_other_pages_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    for answer in (client.get("/api/runs", headers=headers), client.post("/api/runs", headers=headers)):
        assert answer.status_code == 403
        assert answer.json() == {"error": "Requests from other pages are refused."}


def test_a_link_on_another_page_may_open_the_studio(client: TestClient) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/", headers=link | {"sec-fetch-dest": "iframe"}).status_code == 403


def test_changes_need_proof_of_their_origin(client: TestClient, stranger: TestClient) -> None:
    """A program with the token in its header is no page, so it needs no origin."""
    assert client.post("/api/runs").status_code == 403
    assert client.post("/api/runs", headers={"sec-fetch-site": "none"}).status_code == 403
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for allowed in (client.post("/api/runs", headers=OWN_PAGE), stranger.post("/api/runs", headers=bearer)):
        assert allowed.status_code == 405  # it reached the application, which has no such method


def test_answers_carry_the_policy(client: TestClient, stranger: TestClient) -> None:
    for answer in (client.get("/"), client.get("/api/runs"), client.get("/static/app.js"), stranger.get("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/api/runs").headers["cache-control"] == "no-store"


def test_page_has_no_inline_script_and_no_other_host(client: TestClient) -> None:
    text = client.get("/").text
    assert "<script>" not in text and "style=" not in text and "onclick" not in text
    assert "//" not in text.replace("<!doctype html>", "")


def test_large_bodies_are_refused(client: TestClient) -> None:
    too_large = {"content-length": str(MAX_BODY + 1)}
    assert client.post("/api/runs", headers=OWN_PAGE | too_large, content=b"x").status_code == 413
    assert client.post("/api/runs", headers=OWN_PAGE | {"content-length": "-1"}, content=b"x").status_code == 413


def echo(value: dict[str, Any]) -> dict[str, Any]:
    """Return the body of the request."""
    return value


def test_bodies_without_a_length_are_limited(toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router = APIRouter()
    router.add_api_route("/echo", echo, methods=["POST"])
    monkeypatch.setattr(runs_view, "create_router", lambda context: router)
    monkeypatch.setattr(security, "MAX_BODY", 1000)
    client = open_client(toy_store)

    def chunks(count: int) -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(count):
            yield b"x" * 100
        yield b'"}'

    headers = OWN_PAGE | {"content-type": "application/json"}
    assert client.post("/api/echo", headers=headers, content=chunks(9)).status_code == 200
    assert client.post("/api/echo", headers=headers, content=chunks(10)).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/reports/toy/%2e%2e/%2e%2e/align-store.json",
        "/reports/..%2f..%2fetc/passwd",
        "/reports/toy/figures/%2e%2e%2fx.svg",
        "/reports/toy//etc/passwd",
        "/reports/toy/.written",
        "/reports/toy/report.html%00.svg",
        "/static/%2e%2e/app.py",
        "/static/shared/%2e%2e%2fpage.css",
        "/static/shared/samples.js",
    ],
)
def test_paths_out_of_their_folder_are_refused(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (400, 404)
    assert set(answer.json()) == {"error"}


def test_a_link_out_of_the_store_is_not_followed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    client = open_client(store)
    secret = tmp_path / "secret.html"
    secret.write_text("secret")
    (store / "reports" / "linked").mkdir(parents=True)
    (store / "reports" / "linked" / "report.html").symlink_to(secret)
    (store / "reports" / "folder").symlink_to(tmp_path)
    for path in ("/reports/linked/report.html", "/reports/folder/secret.html"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "secret" not in answer.text.replace("secret.html", "")


def test_a_ticket_opens_the_page_of_its_run_only(tmp_path: Path) -> None:
    store = tmp_path / "store"
    client = open_client(store)
    for run in ("one", "two"):
        write_run(store, run, {"stage": {"kind": "number", "key": "a" * 64}}, {})
        (store / "reports" / run).mkdir(parents=True)
        (store / "reports" / run / "report.html").write_text(run)
    addresses = {run["name"]: run["page"] for run in client.get("/api/runs").json()["runs"]}
    client.cookies.clear()
    reload = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get(addresses["one"], headers=reload).text == "one"
    ticket = addresses["one"].partition("?")[2]
    for path in ("/reports/two/report.html", "/reports//one/report.html", "/api/runs", "/", "/static/app.js"):
        assert client.get(f"{path}?{ticket}").status_code == 401, path
    assert client.post(addresses["one"], headers=OWN_PAGE).status_code == 401
    assert client.get("/reports/one/report.html?ticket=wrong").status_code == 401


def test_a_report_is_served_with_a_sandbox(tmp_path: Path) -> None:
    client = open_client(tmp_path / "store")
    digest = "sha256-" + "A" * 43 + "="
    page = tmp_path / "store" / "reports" / "toy" / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<meta content=\"default-src 'none'; script-src '{digest}'; img-src data:\">")
    answer = client.get("/reports/toy/report.html")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert f"script-src '{digest}'" in policy and "sandbox allow-scripts" in policy and "same-origin" not in policy
    page.write_text("<meta content=\"script-src 'unsafe-inline' *; sandbox allow-same-origin\">")
    policy = client.get("/reports/toy/report.html").headers["content-security-policy"]
    assert "script-src" not in policy and "allow-same-origin" not in policy
