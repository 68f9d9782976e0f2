"""Client of an OpenAI-compatible server: many requests at once, each bounded in time, retried where that may help.

The key is read from the environment when a run starts and goes only into the header: not into records, caches, logs or
messages. Torch-free. Leaves out streaming, images, and several choices per request.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from align.config.endpoint import LOCAL, EndpointConfig
from align.config.validation import suggest
from align.data.rows import Message
from align.errors import StageFailed, UserError, printable, redact, shorten
from align.inference.cached_client import Sink
from align.inference.completions import read_completion
from align.inference.rate_limits import RateLimit
from align.inference.requests import Answer, Request
from align.inference.transport import Outage, Reply, ReplyTooLong, Transport
from align.pipeline.context import duration

LOG = logging.getLogger(__name__)

COMPLETIONS = "/chat/completions"
MODELS = "/models"
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
"""Statuses that may pass, next to all from 500 on."""
AWAY_STATUSES = frozenset({502, 503})
"""Statuses of a proxy whose server is away, and of a server that starts or is overloaded."""
FIRST_WAIT = 1.0
MAX_BACKOFF = 60.0
MAX_WAIT = 600.0
"""Seconds before the first retry, doubled each time; their limit; the limit of what Retry-After may ask for."""
MAX_REPLY_BYTES = 16 << 20
MAX_MODELS_BYTES = 4 << 20
"""Bytes of one answer, and of the list of models."""
MODELS_SECONDS = 10
MAX_QUOTE = 200
"""Characters of a server's error that a message quotes."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


class EndpointLost(StageFailed):
    """The endpoint was not reached, not in time, or gave no usable answer, in all attempts."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        """``remedy`` is for a run that ends with this error."""
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem = problem
        self.requests: list[Request] = []
        """Requests that were sent and not answered in all attempts; others may not have been sent."""


class _AttemptFailed(Exception):
    """One attempt failed in a way that another may not."""

    def __init__(
        self,
        problem: str,
        wait: float | None = None,
        *,
        is_reached: bool = True,
        is_usable: bool = True,
        is_away: bool = False,
    ) -> None:
        """``wait`` is what the server asks for, in seconds. Without ``is_usable`` it answered, but not readably.

        ``is_away`` is True for a failure that ends when the server is back.
        """
        super().__init__(problem)
        self.wait = wait
        self.is_reached = is_reached
        self.is_usable = is_usable
        self.is_away = is_away


class Endpoint:
    """A :class:`~align.inference.cached_client.Backend` at an OpenAI-compatible server."""

    path = COMPLETIONS
    noun = "chat completion"
    """Name of an answer in messages."""
    max_bytes = MAX_REPLY_BYTES
    remedy = "Correct the settings, or write `on_error: drop` to leave such rows out and count them."
    """Advice for a request that the server refuses."""

    def __init__(self, config: EndpointConfig, *, drop: bool = False, place: str = "endpoint") -> None:
        """Read the key. Raises ``UserError`` when its variable is not set.

        With ``drop``, a request that the server refuses as such, or never answers readably, becomes an ``Answer`` with
        ``error`` instead of ending the run. ``place`` is the settings' place in the YAML, for messages.
        """
        self.config = config
        self.drop = drop
        self.place = place
        self.identity = config.identity()
        self.rate_limit = RateLimit(config)
        self.retried = 0
        self._checked = False
        """True once a request was answered: address, key and model are right."""
        self._mark_text: Callable[[str], str] | None = None
        """Writes a thought in ``<think>`` if special tokens mark it, which vLLM omits unless it is asked for them."""
        self._may_hide_marks = self.path == COMPLETIONS and urlsplit(config.url).hostname in LOCAL
        """True until the first answer of a server on this machine."""
        self._outage = Outage(config.url, config.patience, f"{place}.patience")
        self._paused_until = 0.0
        """Monotonic time before which no request is sent, because the server asked to wait."""
        self._key = "" if config.key_variable is None else self._read_key(config.key_variable)

    def _read_key(self, variable: str) -> str:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise UserError(
                f"{self.place}.key_variable: the environment variable {variable} is not set; export the endpoint's key "
                "in it, or leave key_variable out for a server that needs none."
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.place}.key_variable: what {variable} holds is no key: odd characters in it.")
        return key

    def answer(self, requests: list[Request], sink: Sink) -> None:
        """Send all requests; ``sink.record`` receives each answer as it comes, in any order.

        The first request is sent before all others, so a wrong address, key or model shows before many are sent. After
        a failure no new request is sent; requests in flight are awaited and recorded, and then the failure is raised:
        ``UserError`` if the settings are wrong, ``EndpointLost`` if the server is at fault.
        """
        asyncio.run(self._answer_all(requests, sink))

    async def _answer_all(self, requests: list[Request], sink: Sink) -> None:
        transport = Transport(
            self.config.url,
            key=self._key,
            headers={"User-Agent": "align"},
            max_connections=self.config.concurrency,
            uses_proxies=self.config.url.startswith("https:"),  # no proxy for this machine
        )
        pending = iter(requests)
        try:
            # 1. One at a time, until a request was answered.
            while not self._checked:
                request = next(pending, None)
                if request is None:
                    return
                await self._answer_one(transport, request, sink)
            # 2. The rest, ``concurrency`` at a time.
            await self._answer_in_parallel(transport, pending, sink)
        finally:
            await transport.close()

    async def _answer_in_parallel(self, transport: Transport, pending: Iterator[Request], sink: Sink) -> None:
        failures: list[Exception] = []

        async def work() -> None:
            for request in pending:  # one iterator for all workers: each reads the next request
                if failures:
                    return
                try:
                    await self._answer_one(transport, request, sink)
                except Exception as error:
                    failures.append(error)
                    return

        await asyncio.gather(*(work() for _ in range(self.config.concurrency)))
        if failures:
            raise _first(failures)

    async def _answer_one(self, transport: Transport, request: Request, sink: Sink) -> None:
        # The cost is reserved before the request is sent: many in flight could exceed the budget together.
        async with sink.reserve(request):
            try:
                answer = await self._retry(transport, request, sink)
            except EndpointLost as error:
                error.requests.append(request)
                raise
            if not answer.error:
                self._checked = True
            sink.record([(request, answer)])

    # ---- attempts ----

    async def _retry(self, transport: Transport, request: Request, sink: Sink) -> Answer:
        """Try until there is an answer, or no retry is left and the patience with a server that is away has ended."""
        attempt = strikes = 0
        answers = self._outage.answers
        while True:
            await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
            try:
                answer = await self._attempt(transport, request, sink)
                self._outage.end()
                return answer
            except _AttemptFailed as error:
                failure = error
            if not failure.is_usable:  # the server has answered, and charged for it
                sink.record_lost(request)
            # Nothing was ever reached at this address: it is probably wrong, and retrying would only delay the message.
            if not self._checked and not failure.is_reached:
                remedy = "Start the server there, or correct the address."
                raise UserError(f"{self.place}.url: {self.config.url} {failure}. {remedy}")
            # A server that never answered is not waited for by time either.
            is_away = failure.is_away and self._checked
            if is_away:
                self._outage.extend(str(failure))
            else:
                self._outage.end()
            attempt += 1
            # A server that has answered others since the last attempt is not away, at least not for them.
            strikes += not is_away or self._outage.answers > answers
            answers = self._outage.answers
            if max(strikes, 0 if is_away and self._outage.seconds_left else attempt) > self.config.retries:
                break
            self.retried += 1
            await self._wait(failure, attempt - 1)
        # The server works, but not for this request. Only its row is omitted.
        if not failure.is_usable and self.drop:
            return Answer("", error=str(failure))
        attempts = "one attempt" if attempt == 1 else f"{attempt} attempts"
        limits = f"{self.place}.retries"
        if is_away and self.config.patience:
            attempts += f" in {duration(self._outage.seconds)}"
            limits += f", {self.place}.patience"
        raise EndpointLost(
            f"the endpoint {self.config.url} {failure}; gave up after {attempts} ({limits}).",
            "What was answered is kept: run again to go on.",
        )

    async def _wait(self, failure: _AttemptFailed, attempt: int) -> None:
        """Wait before the next attempt, as long as the server asks for, else with exponential backoff."""
        # Attempts after the last retry wait for a server that is away: they also grow rarer if it asks for no pause.
        if failure.wait is None or attempt >= self.config.retries:
            pause = min(MAX_BACKOFF, FIRST_WAIT * 2 ** min(attempt, 30))
            # The last attempt is at the end of the patience, not a minute later.
            await asyncio.sleep(min(pause, self._outage.seconds_left or pause))
        if failure.wait is None:
            return
        if failure.wait > MAX_WAIT:
            raise EndpointLost(
                f"the endpoint {self.config.url} {failure} and asks to wait {failure.wait:.0f} s.",
                "What was answered is kept: run again then to go on.",
            )
        # The server's limit holds for the key, so all requests in flight wait, not only this one.
        self._paused_until = max(self._paused_until, time.monotonic() + failure.wait)

    def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON of a request, without ``extra``."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [_wire_message(message) for message in request.messages],
            self.config.length_field: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        optional = {"tools": request.tools, "response_format": request.response_format}
        body |= {name: json.loads(text) for name, text in optional.items() if text}
        if self.config.send_seed:
            body["seed"] = request.own_seed
        if self._mark_text is not None:
            body["skip_special_tokens"] = False
        return body

    def parse(self, request: Request, reply: Any) -> Answer:
        """Return the answer in a reply's JSON. Raises ``ValueError`` for anything else."""
        answer = read_completion(reply)
        return answer if self._mark_text is None else replace(answer, text=self._mark_text(answer.text))

    async def _find_marks(self, transport: Transport) -> Callable[[str], str] | None:
        """Return the function of thoughts that a vLLM server on this machine hides; None if it hides none."""
        seconds = min(MODELS_SECONDS, self.config.timeout)
        reply = await transport.exchange("GET", MODELS, timeout=seconds, max_bytes=MAX_MODELS_BYTES)
        folder = _served_folder(reply.data, self.config.model)
        if folder is None:
            return None
        from align.inference.thoughts import hidden_marks

        try:
            return hidden_marks(folder, self.config.extra.get("chat_template_kwargs"))
        except UserError as error:
            LOG.warning("%s: thoughts are read as answers if special tokens mark them: %s", self.place, error)
            return None

    async def _attempt(self, transport: Transport, request: Request, sink: Sink) -> Answer:
        sent = await self.rate_limit.acquire(request)
        content = json.dumps({**self.body(request), **self.config.extra}).encode()
        reply = await transport.exchange(
            "POST", self.path, content, timeout=self.config.timeout, max_bytes=self.max_bytes
        )
        if reply.error is None:
            answer = self.rate_limit.correct(sent, await self._read(transport, request, reply))
            if not self._may_hide_marks:
                return answer
            self._may_hide_marks = False
            self._mark_text = await self._find_marks(transport)
            # The first answer has no marks: ask again.
            return answer if self._mark_text is None else await self._attempt(transport, request, sink)
        # No connection was made, so the request was not sent and is not charged.
        if reply.is_unreachable:
            raise _AttemptFailed(self._explain(reply), is_reached=False, is_away=True)
        if isinstance(reply.error, ReplyTooLong):
            raise _AttemptFailed(f"sent more than {self.max_bytes >> 20} MiB in one answer", is_usable=False)
        # The server may have answered and charged for it.
        sink.record_lost(request)
        if reply.is_timeout:
            limit = f"{self.config.timeout:g} s ({self.place}.timeout)"
            raise _AttemptFailed(f"did not answer {self.path} within {limit}")
        raise _AttemptFailed(self._explain(reply))

    def _explain(self, reply: Reply) -> str:
        problem = f"{type(reply.error).__name__}: {self._clean(str(reply.error))}".rstrip(": ")
        return f"could not be asked: {problem}"

    # ---- replies ----

    async def _read(self, transport: Transport, request: Request, reply: Reply) -> Answer:
        """Return the answer in a reply. Raises ``_AttemptFailed`` for errors that may pass, else ``UserError``."""
        status = reply.status
        quote = self._quote(reply.data)
        endpoint = f"{self.place}: {self.config.url}"
        if status == 200:
            try:
                return self.parse(request, json.loads(reply.data))
            except (ValueError, RecursionError) as error:  # RecursionError: brackets that nest without end
                reason = self._clean(shorten(str(error)))
                raise _AttemptFailed(
                    f"gave an answer that is no {self.noun} ({reason}){quote}", is_usable=False
                ) from None
        # Busy or broken for the moment.
        if status in RETRIED_STATUSES or status >= 500:
            is_away = status in AWAY_STATUSES
            raise _AttemptFailed(f"answered with status {status}{quote}", _retry_after(reply), is_away=is_away)
        # Settings are wrong: every other request would be refused as well.
        if status in (401, 403):
            sender = f"the key in {self.config.key_variable}" if self._key else "requests without a key (key_variable)"
            raise UserError(f"{endpoint} refuses {sender}: status {status}{quote}.")
        # Address or model is wrong: ask the server for its models, to say which.
        if status == 404:
            raise UserError(f"{endpoint} answers with status 404{quote}. {await self._explain_missing(transport)}")
        if status == 402 or 300 <= status < 400:
            target = self._clean(reply.headers.get("location", ""))
            redirect = f" to {target}" if target else ""
            raise UserError(f"{endpoint} answers with status {status}{quote}{redirect}.")
        problem = f"refuses the request with status {status}{quote}"
        if self.drop:
            return Answer("", error=problem)
        raise UserError(f"{endpoint} {problem}. {self.remedy}")

    async def _explain_missing(self, transport: Transport) -> str:
        """Explain a 404: the address or the model is wrong, and most servers can list their models."""
        seconds = min(MODELS_SECONDS, self.config.timeout)
        reply = await transport.exchange("GET", MODELS, timeout=seconds, max_bytes=MAX_MODELS_BYTES)
        try:
            names = sorted(self._clean(shorten(str(model["id"]))) for model in json.loads(reply.data)["data"])[:20]
        except (ValueError, KeyError, TypeError, RecursionError):
            return f"Is {self.place}.url its address up to /v1, and '{self.config.model}' one of its models?"
        if self.config.model in names:
            return f"It knows the model '{self.config.model}', so {self.place}.url may be wrong."
        return f"{self.place}.model: it has no '{self.config.model}'.{suggest(self.config.model, names)}"

    def _quote(self, data: bytes) -> str:
        """Return the beginning of an error, its message extracted from the usual JSON, with a colon in front."""
        text = data[: MAX_QUOTE * 20].decode("utf-8", "replace")
        try:
            error = json.loads(data)["error"]
            text = error if isinstance(error, str) else str(error["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # another format: quoted as it is
        text = self._clean(text)
        if len(text) > MAX_QUOTE:
            text = f"{text[:MAX_QUOTE]}..."
        return f": {text}" if text else ""

    def _clean(self, text: str) -> str:
        """Return one line without control characters, and without the key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(_CONTROL.sub(" ", redact(text))).strip()


def _wire_message(message: Message) -> Message:
    """Return a message as servers accept it: without ``train``, which OpenAI does not have, and with calls as objects.

    A call's arguments stay JSON text.
    """
    fields = {name: value for name, value in message.items() if name != "train"}
    if fields.get("tool_calls"):
        fields["tool_calls"] = [_wire_call(call) for call in json.loads(fields["tool_calls"])]
    return fields


def _wire_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _served_folder(data: bytes, model: str) -> Path | None:
    """Return the folder of a model in vLLM's list of models; None for other servers, and for a name on the Hub."""
    try:
        cards = {card["id"]: card for card in json.loads(data)["data"] if card["owned_by"] == "vllm"}
        card = cards[model]
        # An adapter has the tokenizer of its base model.
        folder = Path(cards.get(card.get("parent"), card)["root"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return folder if folder.is_dir() else None


def _first(failures: list[Exception]) -> Exception:
    """Return the first of several failures; a failure of the server has the requests of all."""
    first = failures[0]
    if isinstance(first, EndpointLost):
        first.requests = [
            request for error in failures if isinstance(error, EndpointLost) for request in error.requests
        ]
    return first


def _retry_after(reply: Reply) -> float | None:
    """Return the seconds that the server asks to wait, as a number or as a date; None if it does not."""
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
