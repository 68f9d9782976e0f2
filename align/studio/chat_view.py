"""The view ``chat``: checkpoints and endpoints answer the same conversation, streamed, with scores of reward models.

Each reply is a separate request, whose answer is a stream of events: ``status``, ``start``, ``piece``, ``done`` and
``problem``. Closing the request ends the reply. Checkpoints reply in threads, by the ``Replier`` of ``align chat``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse

from align.data.final_answers import split_thought
from align.errors import UserError, shorten
from align.store.artifacts import GENERATORS, Kind
from align.store.record import read_artifact
from align.studio.chat_models import ModelPool
from align.studio.context import NotFound, StudioContext
from align.studio.streams import PING, to_json

MAX_TURNS, MAX_TEXT, MAX_REPLY = 400, 200_000, 32_768
"""Turns of a conversation, characters of a text, tokens of a reply."""
ALTERNATIVES = 5
"""Likeliest tokens that each token of a reply comes with."""
ENDPOINT_TIMEOUT = 120.0
"""Longest pause of an endpoint in seconds."""
SECONDS_TO_END = 20.0
"""Time that models in use have when the studio ends. torch aborts a process that ends while its threads compute."""
MODEL = "model"
Event = tuple[str, Any]
Events = AsyncGenerator[Event]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EndpointChoice(_Body):
    """An endpoint: its key is in the environment variable of this name, or it needs none."""

    url: str = Field(max_length=2000)
    model: str = Field(min_length=1, max_length=500)
    key_variable: str = Field("", max_length=200)
    logprobs: bool = False
    """Ask for log-probabilities, which some servers refuse."""


class Turn(_Body):
    """A message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(max_length=MAX_TEXT)


class NewReply(_Body):
    """A conversation, and who replies to it: a checkpoint (``RUN:STAGE`` or ``kind/key``) or an endpoint."""

    model: str | None = None
    endpoint: EndpointChoice | None = None
    messages: list[Turn] = Field(min_length=1, max_length=MAX_TURNS)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(512, ge=1, le=MAX_REPLY)
    seed: int | None = Field(None, ge=0, lt=2**31)
    thinking: Literal["on", "off"] | None = None
    tools: str = Field("", max_length=MAX_TEXT)

    def turns(self) -> list[dict[str, str]]:
        """Return the conversation as messages."""
        return [turn.model_dump() for turn in self.messages]


class NewScores(_Body):
    """Answers to a conversation that a reward model scores, each with True if its turn was ended."""

    reward: str
    messages: list[Turn] = Field(min_length=1, max_length=MAX_TURNS)
    answers: list[tuple[str, bool]] = Field(min_length=1, max_length=8)
    tools: str = Field("", max_length=MAX_TEXT)


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    view = ChatView(context)
    router = APIRouter(prefix="/chat", lifespan=view.lifespan)
    router.add_api_route("", view.list_models, methods=["GET"])
    router.add_api_route("/reply", view.reply, methods=["POST"], response_model=None)
    router.add_api_route("/scores", view.score, methods=["POST"])
    return router


class ChatView:
    """The answers of the view, and the models in memory."""

    def __init__(self, context: StudioContext, pool: ModelPool | None = None) -> None:
        self.context = context
        self.index = context.index
        self.pool = pool or ModelPool()
        self._kinds: dict[Path, Kind | None] = {}
        self._scoring = threading.Lock()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Wait at the end of the studio until the models are not in use. A reply ends with its next token."""
        yield
        await asyncio.to_thread(self.pool.wait_until_unused, SECONDS_TO_END)

    def list_models(self) -> dict[str, Any]:
        """Return the checkpoints of the store that reply, and those that score, with the stages that made them."""
        stages: dict[tuple[str, str], list[str]] = {}
        when: dict[str, float] = {}
        for name, run in self.index.read().runs.items():
            when[name] = run.when
            for stage, (kind, key) in run.outline.stages.items():
                stages.setdefault((kind, key[:12]), []).append(f"{name}:{stage}")
        loaded = set(self.pool.folders())
        models: list[dict[str, Any]] = []
        rewards: list[dict[str, Any]] = []
        for folder in self.context.store.folders():
            makes = self._kind(folder)
            if makes not in (*GENERATORS, Kind.REWARD):
                continue
            address = f"{folder.parent.name}/{folder.name}"
            # The last run comes first.
            names = stages.get((folder.parent.name, folder.name), [])
            names = sorted(names, key=lambda name: -when[name.split(":")[0]])
            entry: dict[str, Any] = {"id": names[0] if names else address, "address": address, "stages": names}
            entry["loaded"] = folder / MODEL in loaded
            (rewards if makes == Kind.REWARD else models).append(entry)
        return {"models": models, "rewards": rewards}

    async def reply(self, request: NewReply) -> EventSourceResponse:
        """Stream a reply."""
        if (request.model is None) == (request.endpoint is None):
            raise UserError("Name a checkpoint or an endpoint.")
        check_tools(request.tools)
        if request.endpoint is not None:
            return _ReplyResponse(_ask_endpoint(request, request.endpoint, self.context.chat_keys))
        assert request.model is not None
        folder = await asyncio.to_thread(self._find, request.model, GENERATORS)
        return _ReplyResponse(_ask_checkpoint(request, folder, self.pool))

    def score(self, request: NewScores) -> dict[str, Any]:
        """Return the scores of a reward model for answers, as a stage that reads it would score them."""
        check_tools(request.tools)
        folder = self._find(request.reward, (Kind.REWARD,))
        prompt = [turn.model_dump() for turn in request.messages]
        count = len(request.answers)
        with self.pool.borrow("reward", folder) as reward, self._scoring:
            texts = [text for text, _ in request.answers]
            finished = [is_finished for _, is_finished in request.answers]
            scores = reward.score([prompt] * count, texts, finished, [request.tools or None] * count)
        return {"scores": [float(score) for score in scores]}

    def _find(self, name: str, kinds: tuple[Kind, ...]) -> Path:
        """Return the model's folder of ``RUN:STAGE`` or ``kind/key``. Raises ``UserError`` for other artifacts."""
        kind, slash, key = name.partition("/")
        if not slash:
            run, _, stage = name.partition(":")
            stages = self.context.outline(run).stages
            if stage not in stages:
                raise NotFound(f"The run '{run}' has no stage '{stage[:80]}'.")
            kind, key = stages[stage]
        folder = self.context.artifact_folder(kind, key)
        if self._kind(folder) not in kinds:
            wanted = "a reward model" if kinds == (Kind.REWARD,) else "a model that replies"
            raise UserError(f"{name[:120]}: is not {wanted}.")
        return folder / MODEL

    def _kind(self, folder: Path) -> Kind | None:
        """Return the kind of a finished artifact with a model; None for others. Finished artifacts never change."""
        if folder not in self._kinds:
            if not (folder / "record.json").is_file() or not (folder / MODEL / "config.json").is_file():
                return None
            try:
                self._kinds[folder] = read_artifact(folder).kind
            except UserError:  # a damaged record, which `align status` reports
                self._kinds[folder] = None
        return self._kinds[folder]


def check_tools(tools: str) -> None:
    """Raise ``UserError`` unless ``tools`` is empty or the JSON of a list of functions."""
    if not tools:
        return
    try:
        functions = json.loads(tools)
    except (ValueError, RecursionError) as error:
        raise UserError(f"The tools are no JSON: {error}.") from None
    if not isinstance(functions, list) or not all(isinstance(each, dict) for each in functions):
        raise UserError('The tools are a JSON list of functions: [{"type": "function", "function": {...}}].')


class _ReplyResponse(EventSourceResponse):
    """A stream of a reply's events, which ends the reply with the request."""

    def __init__(self, events: Events) -> None:
        self._lines = _lines(events)
        super().__init__(self._lines, ping=PING)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


async def _lines(events: Events) -> AsyncGenerator[dict[str, str]]:
    """Yield events as server-sent events; an error is the last one."""
    async with aclosing(events):
        try:
            async for name, value in events:
                yield {"event": name, "data": to_json(value)}
        except Exception as error:
            yield {"event": "problem", "data": to_json({"error": _explain(error)})}


def _explain(error: Exception) -> str:
    """Return the text of an error for a user; the traceback of a bug is printed."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__} in align. The traceback is in the terminal of `align studio`."


# ---- checkpoints ----


class _Stopped(Exception):
    """The request of a reply was closed."""


async def _ask_checkpoint(request: NewReply, folder: Path, pool: ModelPool) -> Events:
    """Yield the events of a checkpoint's reply, which a thread samples until this generator is closed."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    stopped = threading.Event()

    def put(event: Event | Exception | None) -> None:
        if stopped.is_set() or loop.is_closed():
            raise _Stopped
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def work() -> None:
        outcome = None
        try:
            _sample(request, folder, pool, put)
        except _Stopped:
            return
        except Exception as error:
            outcome = error
        with suppress(_Stopped):
            put(outcome)

    threading.Thread(target=work, name="chat-reply", daemon=True).start()
    try:
        while (event := await queue.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stopped.set()


def _sample(request: NewReply, folder: Path, pool: ModelPool, put: Any) -> None:
    """Sample a reply, and hand its events to ``put``, which raises ``_Stopped`` to end it."""
    from align.inference.replier import ReplyOptions

    options = ReplyOptions(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        thinking=request.thinking,
        tools=request.tools,
        alternatives=ALTERNATIVES,
    )
    with pool.borrow("policy", folder, lambda text: put(("status", {"text": text}))) as replier:
        reply = replier.start(request.turns(), options)
        settings = asdict(reply.options)
        del settings["tools"], settings["alternatives"]
        sizes = {"prompt_tokens": len(reply.prompt), "dropped_turns": reply.dropped_turns}
        put(("start", {"settings": settings, **sizes, "text": reply.opening}))
        began = time.monotonic()
        is_closed = False
        end = 0
        for token in reply.sample():
            if not is_closed:
                end, is_open = reply.thought_end()
                is_closed = end > 0 and not is_open
            part = {"name": token.name, "logprob": token.logprob, "top": token.alternatives}
            put(("piece", {"text": token.text, "thought_end": end, "tokens": [part]}))
        text, end, is_open = reply.marked()
        turn = reply.parse_calls()
        calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
        facts = {"finished": reply.is_finished, "open_thought": is_open, "count": len(reply.tokens)}
        facts |= {"calls": calls, "call_errors": turn.errors, "seconds": time.monotonic() - began}
        put(("done", {"text": text, "thought_end": end, **facts}))


# ---- endpoints ----


async def _ask_endpoint(request: NewReply, choice: EndpointChoice, chat_keys: frozenset[str]) -> Events:
    """Yield the events of an endpoint's reply. ``chat_keys`` are the variables whose keys may be sent."""
    from align.inference.endpoint_stream import open_endpoint

    # The page names the address as well, so any other variable could be sent to anybody.
    if choice.key_variable and choice.key_variable not in chat_keys:
        raise UserError(
            f"The studio may not send the key in {shorten(choice.key_variable)}. Start it with "
            "`align studio --chat-key VARIABLE` for each variable whose key the chat may send."
        )
    endpoint = open_endpoint(choice.url, choice.model, choice.key_variable, ENDPOINT_TIMEOUT)
    settings: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    extra: dict[str, Any] = {"tools": json.loads(request.tools)} if request.tools else {}
    if choice.logprobs:
        extra |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    if request.thinking is not None:
        extra["chat_template_kwargs"] = {"enable_thinking": request.thinking == "on"}
    yield "start", {"settings": settings, "text": ""}
    began = time.monotonic()
    text = ""
    end = 0
    count = 0
    reason = ""
    calls: dict[int, dict[str, str]] = {}
    async with aclosing(endpoint.stream(request.turns(), settings | extra)) as chunks:
        async for chunk in chunks:
            text += chunk.text
            end = len(split_thought(text).thought)
            count += len(chunk.tokens)
            reason = chunk.reason or reason
            for part in chunk.calls:
                call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                for name in ("name", "arguments"):
                    call[name] += part.get(name, "")
            tokens = [_endpoint_token(token) for token in chunk.tokens]
            if chunk.text or chunk.thought or tokens:
                yield "piece", {"text": chunk.text, "thought": chunk.thought, "thought_end": end, "tokens": tokens}
    thought = split_thought(text)
    facts: dict[str, Any] = {"finished": reason != "length", "open_thought": thought.is_open, "count": count or None}
    facts |= {"calls": list(calls.values()), "call_errors": [], "seconds": time.monotonic() - began}
    yield "done", {"text": text, "thought_end": end, **facts}


def _endpoint_token(token: Mapping[str, Any]) -> dict[str, Any]:
    """Return a token of an endpoint as the browser reads it."""
    top = [[str(each.get("token")), _number(each.get("logprob"))] for each in token.get("top_logprobs") or []]
    return {"name": str(token.get("token")), "logprob": _number(token.get("logprob")), "top": top}


def _number(value: Any) -> float | None:
    """Return a log-probability; None for anything else, such as the −9999 with which servers mark impossible tokens."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and -1000 < value <= 1e-3 else None
