"""A client of the studio's application in this process, as a browser that has opened the printed address."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from align.store.store import Store
from align.studio.app import create_app
from align.studio.context import StudioContext

TOKEN = "a-token-of-tests"
ADDRESS = "http://127.0.0.1:8010"
OWN_PAGE = {"origin": ADDRESS, "sec-fetch-site": "same-origin"}
"""Headers of a request that a page of the studio makes."""


def open_client(
    store: Path, *, read_only: bool = False, has_token: bool = True, chat_keys: Collection[str] = (), **options: Any
) -> TestClient:
    """Return a client of a studio about ``store``; with a token it has the cookie."""
    context = StudioContext(Store.open(store), read_only=read_only, chat_keys=frozenset(chat_keys))
    client = TestClient(create_app(context, TOKEN), base_url=ADDRESS, **options)
    if has_token:
        client.cookies.set("align-studio", TOKEN)
    return client
