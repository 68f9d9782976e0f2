"""Guards of the studio: who may ask, from where, how much, and what a page may load.

``Guard`` is a plain ASGI middleware, so streams pass through it without being collected. It checks every request:

1. ``Host`` is a name of this machine. A foreign name that resolves to 127.0.0.1 (DNS rebinding) is refused.
2. ``Origin`` and ``Sec-Fetch-Site`` belong to the studio's own pages. Browsers set both, and pages cannot forge them.
3. The token is there: as ``?token=`` on the first visit, then as a cookie, or as ``Authorization: Bearer``. A report
   page may have a ticket instead, which opens this page only: its sandbox has no cookie when the page reloads itself.
4. A request that changes something has proof of its origin, unless it carries the token in its header.
5. Its body is not larger than ``MAX_BODY``.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine in ``Host``; the port is not checked, since a tunnel over SSH may have another."""
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?")
MAX_BODY = 4 * 1024 * 1024
"""Bytes of a request."""
TOO_LARGE = f"The request is larger than {MAX_BODY // 2**20} MiB."
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
API = "/api/"
REPORTS = "/reports/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every answer that does not set them itself."""
NO_ENTRY = (
    "This studio needs its token. Open the address that `align studio` printed: it ends in ?token= and the token. "
    "The address changes with every start."
)
PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>align studio</title>'
    '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
    '<link rel="icon" href="data:,"></head><body><h1>align studio</h1><p>{}</p></body></html>'
)


@dataclass(frozen=True)
class Answer:
    """A short answer of the guard: a status, a text, and headers."""

    status: int
    text: str
    headers: Mapping[str, str]

    def body(self, as_json: bool) -> tuple[bytes, str]:
        """Return the bytes and their media type: JSON for the API, else a short page."""
        if as_json:
            return json.dumps({"error": self.text}).encode(), "application/json"
        return PAGE.format(self.text).encode(), "text/html; charset=utf-8"


def refuse(status: int, text: str, **headers: str) -> Answer:
    """Return an answer; underscores in the names of headers stand for hyphens."""
    return Answer(status, text, {name.replace("_", "-"): value for name, value in headers.items()})


class Guard:
    """The middleware.

    Args:
        cookie: Name of the cookie, which has the port: cookies do not know ports.
        secret: Key of the tickets of report pages.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str, secret: str) -> None:
        self.app = app
        self.token = token
        self.cookie = cookie
        self.secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the studio has no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = read_headers(scope)
        answer = self._objection(scope, headers)
        if answer is not None:
            await send_answer(answer, scope, send)
            return
        await self._pass_on(scope, receive, send)

    def _objection(self, scope: Scope, headers: Mapping[str, str]) -> Answer | None:
        """Return the answer that ends a request here; None for a request that may pass."""
        host = headers.get("host", "")
        match = HOST.fullmatch(host)
        if match is None or match[1].lower() not in LOCAL_HOSTS:
            return refuse(403, "This host name is not served. Open the studio as http://127.0.0.1 or localhost.")
        if is_foreign(scope, headers, host):
            return refuse(403, "Requests from other pages are refused.")
        has_bearer = self._is_token(read_bearer(headers))
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if "token" in query:
            return self._enter(scope, query)
        has_token = has_bearer or self._is_token(read_cookie(headers, self.cookie))
        if not has_token and not self._has_ticket(scope, query):
            return refuse(401, NO_ENTRY, www_authenticate="Bearer")
        if scope["method"] not in SAFE_METHODS and not has_bearer and not has_own_origin(headers):
            return refuse(403, "A request that changes something needs an Origin header, or the token as a bearer.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return refuse(413, TOO_LARGE)
        return None

    def _enter(self, scope: Scope, query: dict[str, str]) -> Answer:
        """Answer a visit with a token: a cookie and the same address without the token."""
        if scope["method"] != "GET" or not self._is_token(query.pop("token")):
            return refuse(401, NO_ENTRY, www_authenticate="Bearer")
        # One slash: two would begin the address of another host.
        place = "/" + quote(scope["path"].lstrip("/")) + (f"?{urlencode(query)}" if query else "")
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        return refuse(303, "The studio continues at its address.", location=place, set_cookie=cookie)

    def _has_ticket(self, scope: Scope, query: Mapping[str, str]) -> bool:
        """Return True for a report page with its ticket."""
        if scope["method"] not in SAFE_METHODS or not scope["path"].startswith(REPORTS):
            return False
        run = scope["path"].removeprefix(REPORTS).partition("/")[0]
        ticket = query.get("ticket", "").encode("utf-8", "replace")
        return hmac.compare_digest(ticket, report_ticket(self.secret, run).encode())

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request to the application with a limited body, and add headers to its answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = add_headers(message.get("headers", []))
            await send(message)

        await self.app(scope, limit_body(receive), send_with_headers)


def report_ticket(secret: str, run: str) -> str:
    """Return the ticket that opens the report page of a run, and nothing else."""
    return hmac.new(secret.encode(), f"report {run}".encode(), "sha256").hexdigest()


def is_foreign(scope: Scope, headers: Mapping[str, str], host: str) -> bool:
    """Return True for a request that a page of another origin has made, except a link to the studio that is opened."""
    origin = headers.get("origin")
    # "null" is the origin of a sandboxed page, such as a report.
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        return True
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    is_opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (is_opened and scope["method"] == "GET" and not scope["path"].startswith(API))


def has_own_origin(headers: Mapping[str, str]) -> bool:
    """Return True if the browser says that a page of the studio asks; ``is_foreign`` has excluded other origins."""
    return "origin" in headers or headers.get("sec-fetch-site") == "same-origin"


def read_headers(scope: Scope) -> dict[str, str]:
    """Return a request's headers by their name in lower case. A repeated header is joined, so that no check misses it.

    A second ``Host`` or ``Origin`` thereby matches no accepted value.
    """
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        separator = "; " if key == "cookie" else ", "
        headers[key] = f"{headers[key]}{separator}{text}" if key in headers else text
    return headers


def read_bearer(headers: Mapping[str, str]) -> str:
    """Return the token of ``Authorization: Bearer``; empty if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def read_cookie(headers: Mapping[str, str], name: str) -> str:
    """Return the value of a cookie; empty if there is none.

    Other programs of this machine share the cookies of its name, so a malformed cookie must not hide ours.
    """
    for part in headers.get("cookie", "").split(";"):
        cookie, _, value = part.strip().partition("=")
        if cookie == name:
            return value
    return ""


def add_headers(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return an answer's headers and the ``HEADERS`` that it does not set itself."""
    present = {bytes(name).lower() for name, _ in headers}
    more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present]
    return [*headers, *more]


def limit_body(receive: Receive) -> Callable[[], Any]:
    """Return a ``receive`` that ends a body without a length after ``MAX_BODY`` bytes, by an error of status 413."""
    from starlette.exceptions import HTTPException

    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, TOO_LARGE)
        return message

    return receive_limited


async def send_answer(answer: Answer, scope: Scope, send: Send) -> None:
    """Send an answer of the guard."""
    body, media_type = answer.body(as_json=scope["path"].startswith(API))
    headers = {**HEADERS, **answer.headers, "content-type": media_type, "content-length": str(len(body))}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
