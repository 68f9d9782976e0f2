"""Asks an OpenAI-compatible server: many requests at once, each bounded in time, tried again where that may help.

The key is read from the environment when a run starts and goes nowhere but into the header: not into records, caches,
logs or messages. Torch-free. Left out: streaming, tools, images, several choices a request.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

from align.config.validation import suggest
from align.data.rows import Message
from align.errors import UserError, printable, redact, shorten
from align.inference.cached_client import Desk
from align.inference.endpoint import EndpointConfig, read_completion
from align.inference.requests import Answer, Request

AGAIN = frozenset({408, 409, 425, 429})
"""Statuses that may pass, beside all from 500 on."""
FIRST_WAIT, MOST_BACKOFF, MOST_WAIT = 1.0, 60.0, 600.0
"""Seconds: before the first retry, doubled each time; at most; and what a server may ask for with Retry-After."""
CONNECT_SECONDS = 20.0
MOST_BYTES = 16 << 20
"""Of one answer."""
MOST_MODELS_BYTES, CHUNK_BYTES = 4 << 20, 1 << 16
"""Of the list of models, and of what is looked at together."""
SAID = 200
"""Characters shown of what a server says."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


class EndpointLost(RuntimeError):
    """The endpoint was not reached, not in time, or gave nothing that can be used, however often it was asked."""


class _Trouble(Exception):
    """One attempt came to nothing; another may not."""

    def __init__(self, what: str, wait: float | None = None, *, reached: bool = True, usable: bool = True) -> None:
        super().__init__(what)
        self.wait, self.reached, self.usable = wait, reached, usable


class _TooLong(Exception):
    """An answer has more bytes than any needs."""


class Endpoint:
    """Answers requests."""

    def __init__(self, config: EndpointConfig, *, drop: bool = False, place: str = "endpoint") -> None:
        """``drop``: a request that the server refuses as such, or never answers readably, becomes an ``Answer`` with
        ``error`` instead of ending the run. ``place`` is where in the YAML the settings stand, for messages. Raises
        ``UserError`` when the key's variable is not set.
        """
        self.config, self.drop, self.place = config, drop, place
        self.identity = config.identity()
        self.retried = 0
        self._checked = False
        self._open_at = 0.0  # monotonic time before which nothing is sent, because the server asked to wait
        self._key = ""
        if config.key_variable is not None:
            self._key = os.environ.get(config.key_variable, "").strip()
            if not self._key:
                raise UserError(
                    f"{place}.key_variable: the environment variable {config.key_variable} is not set; export the "
                    f"endpoint's key in it, or leave key_variable out for a server that needs none."
                )
            if not (self._key.isascii() and self._key.isprintable()):
                raise UserError(
                    f"{place}.key_variable: what {config.key_variable} holds is no key: odd characters in it."
                )

    def answer(self, requests: list[Request], desk: Desk) -> None:
        """Ask everything; ``desk.keep`` takes each answer as it comes, in any order.

        The first request goes alone, so that a wrong address, key or model is found before many are sent. After a
        failure nothing new is sent, what is under way is waited for and kept, and then the failure is raised:
        ``UserError`` where the settings are wrong, ``EndpointLost`` where the server is at fault.
        """
        asyncio.run(self._answer(requests, desk))

    async def _answer(self, requests: list[Request], desk: Desk) -> None:
        left = iter(requests)
        async with self._client() as client:
            while not self._checked:
                request = next(left, None)
                if request is None:
                    return
                await self._one(client, request, desk)
            await self._in_parallel(client, left, desk)

    def _client(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json", "User-Agent": "align"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        most = self.config.concurrency
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.config.timeout, connect=min(CONNECT_SECONDS, self.config.timeout)),
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            trust_env=self.config.url.startswith("https:"),  # no proxy for this machine
        )

    async def _in_parallel(self, client: httpx.AsyncClient, left: Iterator[Request], desk: Desk) -> None:
        failures: list[Exception] = []

        async def work() -> None:
            for request in left:  # one iterator for all workers: each takes the next
                if failures:
                    return
                try:
                    await self._one(client, request, desk)
                except Exception as error:
                    failures.append(error)
                    return

        await asyncio.gather(*(work() for _ in range(self.config.concurrency)))
        if failures:
            raise failures[0]

    async def _one(self, client: httpx.AsyncClient, request: Request, desk: Desk) -> None:
        async with desk.admit(request):
            answer = await self._persist(client, request, desk)
            if not answer.error:
                self._checked = True
            desk.keep([(request, answer)])

    async def _persist(self, client: httpx.AsyncClient, request: Request, desk: Desk) -> Answer:
        """Try until there is an answer, or no retry is left."""
        for attempt in range(self.config.retries + 1):
            await asyncio.sleep(max(0.0, self._open_at - time.monotonic()))
            try:
                return await self._attempt(client, request, desk)
            except _Trouble as trouble:
                last = trouble
            if not self._checked and not last.reached:
                remedy = "Start the server there, or correct the address."
                raise UserError(f"{self.place}.url: {self.config.url} {last}. {remedy}")
            if attempt < self.config.retries:
                self.retried += 1
                await self._wait(last, attempt)
        if not last.usable and self.drop:
            return Answer("", error=str(last))
        times = "one attempt" if self.config.retries == 0 else f"{self.config.retries + 1} attempts"
        raise EndpointLost(
            f"the endpoint {self.config.url} {last}; gave up after {times} ({self.place}.retries). What was answered "
            "is kept: run again to go on."
        )

    async def _wait(self, trouble: _Trouble, attempt: int) -> None:
        if trouble.wait is None:
            await asyncio.sleep(min(MOST_BACKOFF, FIRST_WAIT * 2**attempt))
            return
        if trouble.wait > MOST_WAIT:
            raise EndpointLost(
                f"the endpoint {self.config.url} {trouble} and asks to wait {trouble.wait:.0f} s. What was answered is "
                "kept: run again then to go on."
            )
        self._open_at = max(self._open_at, time.monotonic() + trouble.wait)  # for all that are under way

    async def _attempt(self, client: httpx.AsyncClient, request: Request, desk: Desk) -> Answer:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.config.timeout):
                reply, data = await self._post(client, request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Trouble(self._why(error, began), reached=False) from None
        except (TimeoutError, httpx.TimeoutException):
            desk.lose(request)
            limit = f"{self.config.timeout:g} s ({self.place}.timeout)"
            raise _Trouble(f"did not answer /chat/completions within {limit}") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # the last for headers that cannot be read
            desk.lose(request)
            raise _Trouble(self._why(error, began)) from None
        return await self._read(client, reply, data)

    def _why(self, error: Exception, began: float) -> str:
        what = f"{type(error).__name__}: {self._clean(str(error))}".rstrip(": ")
        return f"could not be asked: {what}, after {time.monotonic() - began:.1f} s of at most {self.config.timeout:g}"

    async def _post(self, client: httpx.AsyncClient, request: Request) -> tuple[httpx.Response, bytes]:
        seed = {"seed": request.own_seed} if self.config.send_seed else {}
        body = {
            "model": self.config.model,
            "messages": [_spoken(message) for message in request.messages],
            self.config.length_field: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        async with client.stream(
            "POST", f"{self.config.url}/chat/completions", json={**body, **seed, **self.config.extra}
        ) as reply:
            try:
                return reply, await _body(reply, MOST_BYTES)
            except _TooLong:
                what = f"sent more than {MOST_BYTES >> 20} MiB in one answer"
                raise _Trouble(what, usable=False) from None

    async def _read(self, client: httpx.AsyncClient, reply: httpx.Response, data: bytes) -> Answer:
        status, said = reply.status_code, self._said(data)
        at = f"{self.place}: {self.config.url}"
        if status == 200:
            try:
                return read_completion(json.loads(data))
            except (ValueError, RecursionError) as error:  # the latter for brackets that nest without end
                why = self._clean(shorten(str(error)))
                raise _Trouble(f"gave an answer that is no chat completion ({why}){said}", usable=False) from None
        if status in AGAIN or status >= 500:
            raise _Trouble(f"answered with status {status}{said}", _retry_after(reply))
        if status in (401, 403):
            given = f"the key in {self.config.key_variable}" if self._key else "requests without a key (key_variable)"
            raise UserError(f"{at} refuses {given}: status {status}{said}.")
        if status == 404:
            raise UserError(f"{at} answers with status 404{said}. {await self._models(client)}")
        if status == 402 or 300 <= status < 400:
            to = self._clean(reply.headers.get("location", ""))
            raise UserError(f"{at} answers with status {status}{said}{f' to {to}' if to else ''}.")
        what = f"refuses the request with status {status}{said}"
        if self.drop:
            return Answer("", error=what)
        remedy = "Correct the settings, or write `on_error: drop` to leave such rows out and count them."
        raise UserError(f"{at} {what}. {remedy}")

    async def _models(self, client: httpx.AsyncClient) -> str:
        """What to do about a 404: it is the address or the model, and most servers can say which models they have."""
        try:
            async with asyncio.timeout(min(10, self.config.timeout)):
                async with client.stream("GET", f"{self.config.url}/models") as reply:
                    found = json.loads(await _body(reply, MOST_MODELS_BYTES))
            names = sorted(self._clean(shorten(str(one["id"]))) for one in found["data"])[:20]
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError, RecursionError, _TooLong):
            return f"Is {self.place}.url its address up to /v1, and '{self.config.model}' one of its models?"
        if self.config.model in names:
            return f"It knows the model '{self.config.model}', so {self.place}.url may be wrong."
        return f"{self.place}.model: it has no '{self.config.model}'.{suggest(self.config.model, names)}"

    def _said(self, data: bytes) -> str:
        """The beginning of what the server said, with its message taken out of the usual JSON."""
        text = data[: SAID * 20].decode("utf-8", "replace")
        try:
            error = json.loads(data)["error"]
            text = error if isinstance(error, str) else str(error["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # said in another way: shown as it is
        text = self._clean(text)
        return f": {text if len(text) <= SAID else text[:SAID] + '...'}" if text else ""

    def _clean(self, text: str) -> str:
        """One line without control characters, and without the key, which some servers repeat in their errors."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(_CONTROL.sub(" ", redact(text))).strip()


def _spoken(message: Message) -> Message:
    """A message without the mark of training, which is no field of OpenAI's: servers refuse those."""
    return {name: value for name, value in message.items() if name != "train"}


async def _body(reply: httpx.Response, most: int) -> bytes:
    """The whole of an answer. Raises ``_TooLong`` as soon as it has more than ``most`` bytes, also unpacked."""
    data = bytearray()
    async for chunk in reply.aiter_bytes(CHUNK_BYTES):
        data += chunk
        if len(data) > most:
            raise _TooLong
    return bytes(data)


def _retry_after(reply: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, given as such or as a date; None where it does not."""
    value: Any = reply.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass  # a date
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
